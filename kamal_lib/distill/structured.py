"""Structured knowledge distillation (Liu et al., sections 2.1 to 2.3 and 3.2): Eq. 4 and its two players.

The student minimises ℓ_task + λ1 (ℓ_pi + ℓ_pa) − λ2 ℓ_ho: it learns to agree with a frozen teacher pixel by
pixel, pair by pair, and as a whole, which a critic D judges. The critic learns to score the teacher's maps
Q^t higher than the student's Q^s. They take turns at every step:

    fit(StudentObjective(...), loader, schedule, opponent=(CriticObjective(...), its_schedule), fabric=...)

Each uses the other in the mode in which it learns, so that both see the same Q^s and the same D, BatchNorm by
the batch's own statistics. (D by running statistics is another function, which no step has trained.) The
other gets no gradient from it, and its buffers do not move.
"""

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from kamal_lib.distill.amalgamation import freeze
from kamal_lib.losses.adversarial import gradient_penalty, student_loss, wasserstein_loss
from kamal_lib.losses.dense import at_least_float32
from kamal_lib.losses.structured import pair_wise_loss, pixel_wise_loss
from kamal_lib.models.critic import Critic
from kamal_lib.models.segmenters import Segmenter
from kamal_lib.processes import processes
from kamal_lib.sample import VOID
from kamal_lib.tasks import Normals, Segmentation, Task

Comparison = Callable[[Tensor, Tensor], Tensor]
"""A loss of the student's and the teacher's logits, features or scores."""

SEGMENTATION = {"pixel": 10.0, "pair": 10.0, "holistic": 0.1}
"""λ1, λ1 and λ2 of Eq. 4."""

DEPTH = {"pair": 10.0, "holistic": 0.1}
"""The same for depth, where pixel-wise distillation did not help: the paper leaves it out (section 3.2.4)."""


def holistic_map(
    task: Task, response: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch _ height width"]:
    """Q, the map that the critic sees: class probabilities of a segmentation, else what the task decodes.

    A depth map, in metres, is one channel.
    """
    if isinstance(task, Segmentation):
        return at_least_float32(response).softmax(dim=1)
    decoded = task.decode(response)
    return decoded[:, None] if decoded.ndim == 3 else decoded


def as_it_is(module: nn.Module, *inputs: Tensor) -> Any:
    """The module's output, with gradients for the inputs alone; the module's buffers do not move."""
    weights = {name: value.detach() for name, value in module.named_parameters()}
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    return functional_call(module, weights | buffers, inputs)


class _Player(nn.Module):
    """What both objectives share: the frozen teacher and the other player, used and no part of its state."""

    def __init__(self, student: Segmenter, teacher: Segmenter, task: Task, others: tuple[nn.Module, ...]):
        super().__init__()
        if student is teacher:
            raise ValueError("student and teacher are one network: build the student as another one")
        if len(student.tasks) != 1 or student.tasks[0] not in teacher.tasks:
            raise ValueError(
                f"the student must have one task, which its teacher has, too, got {student.tasks} and "
                f"{teacher.tasks}: build both with a head of that name"
            )
        self.task, self.name = task, student.tasks[0]
        # Tuples hide modules from torch: no parameters, no state. `_apply` and `train` take them along.
        self._teacher, self._others = (teacher,), others
        self.check_teacher()
        freeze(teacher)

    def _apply(self, fn, recurse: bool = True) -> "_Player":
        for module in (*self._teacher, *self._others):
            module._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "_Player":
        """Sets the mode of both players; the teacher stays in eval mode."""
        for module in self._others:
            module.train(mode)
        return super().train(mode)

    def check_teacher(self) -> None:
        """Raises ValueError for one that follows the student's batches."""
        if self._teacher[0].training:
            raise ValueError(
                "the teacher is in training mode, where its norm layers follow the student's batches: call "
                "eval() on it"
            )

    def check(self, student: nn.Module, ours: Tensor, theirs: Tensor) -> None:
        """Raises ValueError for another mode than the objective's, and other classes than the task's."""
        self.check_teacher()
        if student.training != self.training:
            modes = {True: "training", False: "eval"}
            raise ValueError(
                f"the student is in {modes[student.training]} mode and its objective in "
                f"{modes[self.training]} mode: call train() or eval() on the objective, which sets both"
            )
        for whose, response in (("student", ours), ("teacher", theirs)):
            if response.shape[1] != self.task.channels:
                raise ValueError(
                    f"the {whose} answers in {response.shape[1]} channels, its {self.name} task has "
                    f"{self.task.channels}: was it built for other classes or bins?"
                )


class StudentObjective(_Player):
    """Eq. 4 for the student: ℓ_task + λ1 (ℓ_pi + ℓ_pa) − λ2 E[D(Q^s | I)], every term under its own name.

    `weights` are the λ of the terms that take part; the others are off:

        "pixel"     Eq. 1 on the classifier's output before it is enlarged, W'×H' as printed, by `pixel`
        "holistic"  −E[D(Q^s | I)] of the `critic`; Q^s at the image's size, to which the paper enlarges it
                    for its results: it does not say where image and map meet, and W'×H' may be too small for
                    a critic of five blocks
        any other   the loss of that name in `features`, on the last features before the classifier: "pair",
                    Eq. 2, or whatever is given in its place. One that is a module learns with the student.

    `functools.partial` sets their options: {"local": partial(pair_wise_loss, patch=1, radius=1)}.

    Losses in `finer` compare the encoders' first stages, twice as fine as the last features, with weights of
    their own: the feature-level fusion of Table 2. (The paper fuses a third level, four times as fine.)

    `labels` True adds the task's loss, weight 1, on the samples' own targets, of which every batch must have
    some; "some" takes batches without any as well, for labelled and unlabelled images in one set; False reads
    no target. The task's loss is a mean over those images of a batch that have known pixels, however few.

    State: the student, and what learns in `features`. Raises ValueError for a student of several tasks or
    one that the teacher lacks, a teacher in training mode, weights that are negative or name no term, a
    critic without its weight or the other way round, and where nothing is left to learn from; in `forward`
    for classes or sizes that differ, a student in another mode, and a batch without its labels.
    """

    def __init__(
        self,
        student: Segmenter,
        teacher: Segmenter,
        task: Task,
        *,
        critic: Critic | None = None,
        weights: Mapping[str, float] = SEGMENTATION,
        labels: bool | str = True,
        pixel: Comparison = pixel_wise_loss,
        features: Mapping[str, Comparison] | None = None,
        finer: Mapping[str, Comparison] | None = None,
    ):
        super().__init__(student, teacher, task, () if critic is None else (critic,))
        compared, below = {"pair": pair_wise_loss} if features is None else dict(features), dict(finer or {})
        terms = ["pixel", *compared, *below, "holistic"]
        if len(set(terms)) < len(terms):
            raise ValueError(f"every term needs a name of its own, got {', '.join(terms)}: rename one")
        if not set(weights) <= set(terms) or not all(0 <= w < math.inf for w in weights.values()):
            raise ValueError(
                f"weights λ must be numbers from 0 on for some of the terms {', '.join(terms)}, got "
                f"{dict(weights)}: leave out what shall be off, give `features` a loss for any other name"
            )
        if (critic is None) == ("holistic" in weights):
            raise ValueError(
                f"the holistic term needs a critic and a weight, got {'no' if critic is None else 'a'} "
                f"critic and weights {dict(weights)}: give both or neither"
            )
        if "pixel" in weights and isinstance(task, Normals):
            raise ValueError("normals are no choice among classes: leave 'pixel' out of the weights")
        if labels not in (True, False, "some") or not (labels or weights):
            raise ValueError(
                f"labels must be True, False or 'some', and without them a term must have a weight, got "
                f"{labels!r} and weights {dict(weights)}"
            )
        self.student, self.weights, self.labels, self.pixel = student, dict(weights), labels, pixel
        self.features = {name: loss for name, loss in compared.items() if name in weights}
        self.finer = {name: loss for name, loss in below.items() if name in weights}
        compared = self.features | self.finer
        self.learning = nn.ModuleDict({n: f for n, f in compared.items() if isinstance(f, nn.Module)})

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{task: ℓ_task, "pixel": λ1 ℓ_pi, "pair": λ1 ℓ_pa, "holistic": −λ2 E[D(Q^s | I)]}, what is on."""
        image, (teacher,) = batch["image"], self._teacher
        (ours_finer, ours), responses = self.levels(self.student, image)
        with torch.no_grad():
            (theirs_finer, theirs), targets = self.levels(teacher, image)
        response = responses[self.name]
        self.check(self.student, response, targets[self.name])
        losses = {self.name: self.task_loss(response, batch)} if self.labels else {}
        if "pixel" in self.weights:
            small = (net.heads[self.name](f) for net, f in ((self.student, ours), (teacher, theirs)))
            losses["pixel"] = self.weights["pixel"] * self.pixel(*small)
        for name, loss in self.features.items():
            losses[name] = self.weights[name] * loss(ours, theirs)
        for name, loss in self.finer.items():
            losses[name] = self.weights[name] * loss(ours_finer, theirs_finer)
        if self._others:
            score = as_it_is(self._others[0], image, holistic_map(self.task, response))
            losses["holistic"] = self.weights["holistic"] * student_loss(score)
        return losses

    def levels(self, network: Segmenter, image: Tensor) -> tuple[tuple[Any, Tensor], dict[str, Tensor]]:
        """((First stage's features where they are compared, last features), responses)."""
        if self.finer:
            return network.levels_and_response(image)
        features, responses = network.features_and_response(image)
        return (None, features), responses

    def task_loss(self, response: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """ℓ_task; 0 for a batch without labels where those are allowed."""
        key, target = self.task.key, batch.get(self.task.key)
        unknown = 0 if target is None or target.is_floating_point() else VOID
        if self.labels != "some" and (target is None or not bool((target != unknown).any())):
            raise ValueError(
                f"the {self.name} loss wants {key!r} in every batch, got "
                f"{sorted(batch) if target is None else 'one without a known pixel'}: without labels pass "
                f"labels=False, with labels for some of the images labels='some'"
            )
        return 0 * response.float().mean() if target is None else self.task.loss(response, target)


class CriticObjective(_Player):
    """Eq. 3 and a gradient penalty for the critic: E[D(Q^s | I)] − E[D(Q^t | I)] + penalty · E[(‖∇D‖ − 1)²].

    Teacher's maps, real, and student's, fake, at the image's size, are those of `StudentObjective`, detached.
    The student makes them in this objective's mode, and does not change. `loss` may be `hinge_loss`;
    `penalty` 0 leaves the penalty out.

    The ε of the penalty are a function of `seed` and of the number of training batches so far, which is part
    of the state: a resumed training draws what an unbroken one draws, several processes what one does.

    State: the critic and that number. Raises ValueError as `StudentObjective`, and for a negative penalty.
    """

    def __init__(
        self,
        critic: Critic,
        student: Segmenter,
        teacher: Segmenter,
        task: Task,
        *,
        seed: int,
        loss: Comparison = wasserstein_loss,
        penalty: float = 10.0,
    ):
        super().__init__(student, teacher, task, (student,))
        if not 0 <= penalty < math.inf:
            raise ValueError(f"the weight of the gradient penalty must be from 0 on, got {penalty}")
        self.critic, self.seed, self.loss, self.penalty = critic, seed, loss, penalty
        self.batches: Tensor
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"critic": Eq. 3 or its hinge form, "penalty": the weighted gradient penalty}."""
        image, (teacher,), (student,) = batch["image"], self._teacher, self._others
        with torch.no_grad():
            response, target = as_it_is(student, image)[self.name], teacher(image)[self.name]
            self.check(student, response, target)
            fake, real = holistic_map(self.task, response), holistic_map(self.task, target)
        losses = {"critic": self.loss(self.critic(image, real), self.critic(image, fake))}
        if self.penalty:
            mix = self.mix(len(image))
            losses["penalty"] = gradient_penalty(self.critic, image, real, fake, mix=mix, weight=self.penalty)
        self.batches += self.training
        return losses

    def mix(self, images: int) -> Float[Tensor, " images"]:
        """ε of this process's share of the batch: every count-th image is its own."""
        count, rank = processes()
        draws = Random(f"{self.seed} {int(self.batches)}")
        return torch.tensor([draws.random() for _ in range(count * images)])[rank::count]
