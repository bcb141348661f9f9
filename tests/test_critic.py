"""The critic of Liu et al. and Eq. 3: identities, closed forms of the penalty, any size, bad input."""

import math

import pytest
import torch
from torch import nn

from kamal_lib.losses.adversarial import gradient_penalty, hinge_loss, student_loss, wasserstein_loss
from kamal_lib.models.critic import Critic, SelfAttention


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def one_start():
    torch.manual_seed(0)


# --- self-attention -----------------------------------------------------------------------------------------


def test_rows_of_attention_sum_to_1():
    rows = SelfAttention(16).attention(5 * noise(2, 16, 3, 5)).detach()
    assert rows.shape == (2, 15, 15)
    assert float(rows.min()) >= 0
    assert torch.allclose(rows.sum(2), torch.ones(2, 15), atol=1e-6)


def test_a_fresh_module_changes_nothing():
    features = noise(2, 16, 3, 5)
    module = SelfAttention(16)
    assert module.gamma.tolist() == [0]
    assert torch.equal(module(features), features)


def test_attention_by_loops():
    module, features = SelfAttention(16).requires_grad_(False), noise(1, 16, 2, 3)
    module.gamma.data.fill_(0.5)
    q, k, v = (f(features)[0].flatten(1) for f in (module.query, module.key, module.value))
    assert q.shape == k.shape == (2, 6)
    for i in range(6):
        weights = [math.exp(float(q[:, i] @ k[:, j])) for j in range(6)]
        seen = sum(w / sum(weights) * v[:, j] for j, w in enumerate(weights))
        expected = features[0].flatten(1)[:, i] + 0.5 * seen
        assert torch.allclose(module(features)[0].flatten(1)[:, i], expected, atol=1e-5)


def test_gamma_learns_from_0():
    module = SelfAttention(16)
    module(noise(2, 16, 3, 5)).square().sum().backward()
    assert float(module.gamma.grad.abs()) > 0


# --- the critic ---------------------------------------------------------------------------------------------


def kinds(critic: Critic) -> str:
    """One letter a layer: B batch norm, C convolution, R ReLU, A attention."""
    letters = {nn.BatchNorm2d: "B", nn.Conv2d: "C", nn.ReLU: "R", SelfAttention: "A"}
    return "".join(letters[type(layer)] for layer in critic.layers)


def test_the_papers_critic():
    """BatchNorm at the input, five blocks, the last without norm, attention between the final three."""
    critic = Critic(19)
    assert kinds(critic) == "BCBRCBRCBRACBRAC"
    widths = [layer.out_channels for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]
    assert critic.layers[0].num_features == 3 + 19


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [
        (0, 4, "BCBRCBRCBRCBRC"),
        (1, 4, "BCBRCBRCBRCBRAC"),
        (3, 4, "BCBRCBRACBRACBRAC"),
        (4, 4, "BCBRACBRACBRACBRAC"),
        (2, 3, "BCBRCBRACBRAC"),
        (2, 2, "BCBRACBRAC"),
    ],
)
def test_the_family_of_critics(n, m, expected):
    """AnLm of Table 3: n self-attention modules, m convolution blocks with BatchNorm."""
    critic = Critic(5, blocks=m + 1, attentions=n, width=8)
    assert kinds(critic) == expected
    assert critic(noise(2, 3, 32, 32), noise(2, 5, 32, 32)).shape == (2,)


def test_a_critic_without_norm():
    critic = Critic(5, width=8, norm=False)
    assert kinds(critic) == "CRCRCRACRAC"
    assert all(layer.bias is not None for layer in critic.layers if isinstance(layer, nn.Conv2d))
    image, maps = noise(2, 3, 16, 16), noise(2, 5, 16, 16, seed=1)
    alone = torch.cat([critic(image[i : i + 1], maps[i : i + 1]) for i in range(2)])
    assert torch.allclose(critic(image, maps), alone, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (48, 64), (65, 65), (33, 100)])
@pytest.mark.parametrize("channels", [1, 13])
def test_any_size_and_any_number_of_channels(size, channels):
    scores = Critic(channels, width=4)(noise(2, 3, *size), noise(2, channels, *size, seed=1))
    assert scores.shape == (2,)
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("size", [(16, 16), (65, 48)])
def test_the_score_is_a_mean(size):
    critic = Critic(5, width=4)
    nn.init.zeros_(critic.layers[-1].weight)
    nn.init.constant_(critic.layers[-1].bias, 1.5)
    assert critic(noise(2, 3, *size), noise(2, 5, *size)).tolist() == [1.5, 1.5]


def test_the_score_depends_on_image_and_map():
    critic = Critic(5, width=8).eval().requires_grad_(False)
    image, maps = noise(1, 3, 32, 32), noise(1, 5, 32, 32, seed=1)
    score = float(critic(image, maps))
    assert float(critic(image, maps.flip(3))) != score
    assert float(critic(image.flip(3), maps)) != score


@pytest.mark.parametrize(("blocks", "least"), [(5, 16), (4, 8), (3, 4), (2, 2)])
def test_the_least_size_is_said(blocks, least):
    critic = Critic(5, blocks=blocks, attentions=1, width=4)
    assert critic.least_size == least
    assert critic(noise(2, 3, least, least), noise(2, 5, least, least)).shape == (2,)
    with pytest.raises(ValueError, match=rf"needs at least {least}×{least} pixels, got {least}×{least - 1}:"):
        critic(noise(2, 3, least, least - 1), noise(2, 5, least, least - 1))


@pytest.mark.parametrize("shape", [(2, 5, 8, 16), (2, 4, 16, 16), (1, 5, 16, 16)])
def test_a_map_that_is_not_the_images(shape):
    with pytest.raises(
        ValueError, match=r"maps of 5 channels .* \(2, 5, 16, 16\), got .*: resize one, or build"
    ):
        Critic(5, width=4)(noise(2, 3, 16, 16), noise(*shape))


def test_one_value_is_too_few_for_batch_norm():
    image, maps = noise(1, 3, 16, 16), noise(1, 5, 16, 16)
    with pytest.raises(
        ValueError, match=r"needs two values .* 16×16 .* two images, 32 pixels, or norm=False"
    ):
        Critic(5, width=4)(image, maps)
    for critic in (Critic(5, width=4).eval(), Critic(5, width=4, norm=False)):
        assert critic(image, maps).shape == (1,)


@pytest.mark.parametrize(("blocks", "attentions"), [(1, 0), (5, 5), (5, -1)])
def test_a_critic_that_cannot_be(blocks, attentions):
    with pytest.raises(
        ValueError, match=f"at least 2 blocks.* got {blocks} and {attentions}: the paper's A2L4"
    ):
        Critic(5, blocks=blocks, attentions=attentions)


# --- Eq. 3 --------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert float(wasserstein_loss(real, fake)) == pytest.approx(-1 - 1.25)
    assert float(hinge_loss(real, fake)) == pytest.approx((0 + 0.5) / 2 + (0 + 2) / 2)
    assert float(student_loss(fake)) == pytest.approx(1)


def test_wasserstein_is_zero_and_hinge_two_at_equal_scores_of_0():
    scores = torch.zeros(3)
    assert float(wasserstein_loss(scores, scores)) == 0
    assert float(hinge_loss(scores, scores)) == 2


def test_the_student_climbs_where_the_critic_descends():
    real, fake = noise(4).requires_grad_(), noise(4, seed=1).requires_grad_()
    (critic,) = torch.autograd.grad(wasserstein_loss(real, fake), fake)
    (student,) = torch.autograd.grad(student_loss(fake), fake)
    assert torch.equal(critic, -student)


def linear(w: torch.Tensor):
    return lambda image, maps: (w * maps).sum((1, 2, 3))


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 3.0])
def test_penalty_of_a_linear_critic(length):
    """λ(‖w‖ − 1)² wherever it is taken, and its gradient 2λ(‖w‖ − 1) w / ‖w‖."""
    w = torch.nn.functional.normalize(noise(5, 4, 4, dtype=torch.float64).flatten(), dim=0).view(5, 4, 4)
    w = (length * w).requires_grad_()
    image, real, fake = (noise(3, c, 4, 4, seed=c, dtype=torch.float64) for c in (3, 5, 5))
    penalty = gradient_penalty(linear(w), image, real, fake + 1)
    assert float(penalty.detach()) == pytest.approx(10 * (length - 1) ** 2, abs=1e-12)
    penalty.backward()
    expected = 20 * (length - 1) / max(length, 1e-9) * w.detach()
    assert torch.allclose(w.grad, expected, atol=1e-12)


def test_no_gradient_has_a_finite_penalty():
    """A square root of the squares gives NaN here, as four threads about the public code report."""
    w = torch.zeros(5, 4, 4, requires_grad=True)
    penalty = gradient_penalty(linear(w), noise(2, 3, 4, 4), noise(2, 5, 4, 4), noise(2, 5, 4, 4, seed=1))
    assert float(penalty.detach()) == 10
    penalty.backward()
    assert float(w.grad.abs().max()) == 0
    naive = 10 * (w.square().sum().sqrt() - 1).square()
    assert bool(torch.autograd.grad(naive, w)[0].isnan().all())


def test_a_dead_critic_has_a_finite_penalty():
    critic = Critic(5, width=4)
    nn.init.zeros_(critic.layers[-1].weight)
    penalty = gradient_penalty(critic, noise(2, 3, 16, 16), noise(2, 5, 16, 16), noise(2, 5, 16, 16, seed=1))
    penalty.backward()
    assert float(penalty.detach()) == 10
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in critic.parameters())


def test_the_penalty_is_taken_between_the_maps():
    """D = Σ Q²/2 has the gradient Q: its length says where the penalty looked."""
    image, real, fake = noise(3, 3, 4, 4), noise(3, 5, 4, 4, seed=1), noise(3, 5, 4, 4, seed=2)
    mix = torch.tensor([0.0, 0.25, 1.0])
    found = gradient_penalty(
        lambda image, q: q.square().sum((1, 2, 3)) / 2, image, real, fake, mix=mix, weight=1.0
    )
    where = (fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2])
    assert float(found.detach()) == pytest.approx(
        sum((float(q.norm()) - 1) ** 2 for q in where) / 3, rel=1e-5
    )


@pytest.mark.parametrize("norm", [True, False])
def test_the_penalty_trains_the_critic_and_nobody_else(norm):
    critic = Critic(5, width=4, norm=norm)
    image = noise(2, 3, 32, 32)
    real, fake = noise(2, 5, 32, 32, seed=1).requires_grad_(), noise(2, 5, 32, 32, seed=2).requires_grad_()
    with torch.no_grad():  # works in an evaluation too
        value = float(gradient_penalty(critic, image, real, fake, mix=torch.tensor([0.3, 0.6])))
    loss = gradient_penalty(critic, image, real, fake, mix=torch.tensor([0.3, 0.6]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert real.grad is None
    assert fake.grad is None
    gradients = [p.grad for p in critic.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("norm", [True, False])
def test_in_mixed_precision(norm):
    """Attention, scores and the penalty's norm stay in float32."""
    critic = Critic(5, width=8, norm=norm)
    image, real, fake = noise(2, 3, 32, 32), noise(2, 5, 32, 32, seed=1), noise(2, 5, 32, 32, seed=2)
    image = image.contiguous(memory_format=torch.channels_last)
    mix = torch.tensor([0.3, 0.6])
    plain = gradient_penalty(critic, image, real, fake, mix=mix)
    with torch.autocast("cpu", torch.bfloat16):
        rows = critic.layers[-2].attention(noise(2, 64, 3, 4))
        penalty = gradient_penalty(critic, image, real, fake, mix=mix)
        penalty.backward()
        scores = critic(image, real)
    assert rows.dtype == scores.dtype == penalty.dtype == torch.float32
    assert torch.allclose(rows.sum(2), torch.ones(2, 12), atol=1e-6)
    assert float(penalty.detach()) == pytest.approx(float(plain.detach()), rel=0.05)


def test_gradients_of_the_penalty_in_float64():
    critic = Critic(2, blocks=3, attentions=1, width=2, norm=False).double()
    critic.layers[-2].gamma.data.fill_(0.7)
    image, real, fake = (noise(2, c, 8, 8, seed=c, dtype=torch.float64) for c in (3, 2, 2))
    mix = torch.tensor([0.2, 0.9]).double()
    weight = critic.layers[0].weight

    def penalty(w):
        return gradient_penalty(
            lambda i, q: torch.func.functional_call(critic, {"layers.0.weight": w}, (i, q)),
            image,
            real,
            fake + 1,
            mix=mix,
        )

    assert torch.autograd.gradcheck(penalty, weight, atol=1e-6)


def test_maps_that_cannot_be_mixed():
    with pytest.raises(
        ValueError, match=r"one shape to be mixed, got \(2, 5, 4, 4\) and \(2, 5, 8, 8\): resize"
    ):
        gradient_penalty(linear(noise(5, 4, 4)), noise(2, 3, 4, 4), noise(2, 5, 4, 4), noise(2, 5, 8, 8))


@pytest.mark.parametrize("norm", [True, False])
def test_a_critic_learns_to_tell_teacher_from_student(norm):
    """Sure maps are the teacher's, unsure ones the student's: the teacher's come to score higher."""
    critic = Critic(4, blocks=3, width=8, norm=norm)
    optimizer = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.9))
    image, logits = torch.rand(4, 3, 16, 16), noise(4, 4, 16, 16)
    real, fake = (8 * logits).softmax(1), logits.softmax(1)
    distances = []
    for _ in range(12):
        distance = wasserstein_loss(critic(image, real), critic(image, fake))
        optimizer.zero_grad()
        (distance + gradient_penalty(critic, image, real, fake)).backward()
        optimizer.step()
        distances.append(float(distance.detach()))
    assert distances[-1] < distances[0] - 0.1
    assert distances[-1] < 0
