"""Pictures, curves, diagrams, tables and widgets: what they show is what they were given, and can be read."""

import io
from base64 import b64decode

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from nbclient import NotebookClient
from PIL import Image
from torchvision import tv_tensors

from kamal_lib.sample import VOID, Depth, Normals, Sample
from kamal_lib.viz.curves import block_losses, learning_curves
from kamal_lib.viz.diagram import branch_diagram, projection_diagram
from kamal_lib.viz.panels import (
    PALETTE,
    Panel,
    Picture,
    class_colours,
    class_map,
    grid,
    normal_map,
    prediction_panels,
    scene_panels,
)
from kamal_lib.viz.tables import in_billions, in_millions, results_table
from kamal_lib.viz.widgets import VIEWS, draw, scene_browser

NAMES = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)


def make_sample(seed: int = 0, size: tuple[int, int] = (48, 64)) -> Sample:
    """A random scene with blocks of labels, a sloping depth, all normals, and unknown pixels in a corner."""
    rng, (height, width) = torch.Generator().manual_seed(seed), size
    labels = torch.randint(0, 13, (6, 8), generator=rng).repeat_interleave(8, 0).repeat_interleave(8, 1)
    depth = torch.linspace(1, 8, width).expand(height, width) + torch.rand(size, generator=rng)
    normals = torch.nn.functional.normalize(torch.randn(3, *size, generator=rng), dim=0)
    labels = labels[:height, :width].clone()
    labels[:2, :4], depth[:2, :4], normals[:, :2, :4] = VOID, 0, 0
    boxes = torch.tensor([[0.0, 0.0, 20.0, 10.0], [30.0, 20.0, 64.0, 48.0]])
    return Sample(
        image=tv_tensors.Image(torch.rand(3, *size, generator=rng)),
        labels=tv_tensors.Mask(labels),
        depth=Depth(depth),
        normals=Normals(normals),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        box_labels=torch.tensor([3, 12]),
    )


def shown(axes: Axes) -> np.ma.MaskedArray:
    """The array that an axes' image was given."""
    return axes.images[0].get_array()


def legend_of(figure: Picture) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


SAMPLES = [make_sample(seed) for seed in range(3)]
LOSSES = {"segmentation": [1.2, 1.0, 0.9, 0.6, 0.5, 0.7], "depth": [0.3, 0.2, 0.1, 0.2, 0.15, 0.12]}
ROWS = [{"epoch": float(e), "loss": 2.0 / e} for e in range(1, 6)]
LABELS, DEPTHS = [s["labels"] for s in SAMPLES], [1.2 * s["depth"] for s in SAMPLES]
NORMALS = {"NormNet": [-SAMPLES[0]["normals"]], "TargetNet": [SAMPLES[1]["normals"]]}
NETS = {"seg": "SegNet", "depth": "DepthNet", "normals": "NormNet"}
FIGURES = {
    "scenes": lambda: scene_panels(SAMPLES, NAMES),
    "segmentation": lambda: prediction_panels(
        SAMPLES, "labels", {"SegNet (teacher)": LABELS, "TargetNet": LABELS}, NAMES
    ),
    "depth": lambda: prediction_panels(SAMPLES, "depth", {"DepthNet (teacher)": DEPTHS, "TargetNet": DEPTHS}),
    "normals": lambda: prediction_panels(SAMPLES[:1], "normals", NORMALS),
    **{view: lambda view=view: draw(SAMPLES[0], view, NAMES) for view in VIEWS},
    "curves": lambda: learning_curves({"student": ROWS, "teacher": ROWS[1:]}, "loss", label="loss (nats)"),
    "blocks": lambda: block_losses(LOSSES, {"segmentation": 5, "depth": 6}, decoder_from=4),
    "branches": lambda: branch_diagram(
        (64, 128, 128, 64), {"seg": 3, "depth": 3, "normals": 4}, pools=(True, False), names=NETS
    ),
    "projection": lambda: projection_diagram(4, 10, {"SegNet": "s", "DepthNet": "d", "NormNet": "m"}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_small_readable_whole_and_leaves_pyplot_alone(name: str):
    figure = FIGURES[name]()
    bundle, metadata = figure._repr_mimebundle_()
    picture = Image.open(io.BytesIO(b64decode(bundle["image/png"])))
    width, height = figure.get_size_inches() * figure.dpi
    assert (picture.format, picture.size) == ("PNG", (int(width), int(height)))
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert len(bundle["image/png"]) < 100 * 1024  # random scenes compress worse than any real one
    assert len(figure.alt) > 20
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == figure.alt
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 8
    drawn, page = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.min.min() >= -0.01, "cut off at the left or below"
    assert (drawn.max <= page + 0.01).all(), "cut off at the right or above"
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(ax.bbox) for ax in figure.axes)
    assert plt.get_fignums() == []


# Colours


def test_class_map_is_a_lookup_and_void_is_transparent():
    labels = torch.tensor([[0, 2], [VOID, 12]])
    slow = np.zeros((2, 2, 4))
    for y in range(2):
        for x in range(2):
            if labels[y, x] != VOID:
                slow[y, x] = [*(255 * v for v in to_rgb(PALETTE[labels[y, x]])), 255]
    np.testing.assert_allclose(class_map(labels, PALETTE), slow, atol=0.5)


@pytest.mark.parametrize("label", [-1, 13, 254])
def test_a_label_without_a_class_is_refused(label: int):
    with pytest.raises(ValueError, match=f"label {label} is none of 13 named classes"):
        class_map(torch.tensor([[label]]), PALETTE)
    boxed = Panel("image", torch.zeros(3, 4, 4), boxes=torch.zeros(1, 4), box_labels=torch.tensor([label]))
    with pytest.raises(ValueError, match=f"label {label} is none of 13 named classes"):
        grid([[boxed]], class_names=NAMES)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISIONS = {
    "full": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.00388, -0.04812, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
}
TOUCHING = {
    "wall": [name for name in NAMES if name != "wall"],
    "floor": ["bed", "chair", "furniture", "objects", "sofa", "table"],
    "furniture": ["books", "objects", "tv"],
    "objects": ["bed", "sofa", "table"],
    "table": ["books", "chair", "sofa"],
    "window": ["ceiling", "picture"],
}


def distances(colours: tuple[str, ...], vision: str) -> np.ndarray:
    """Distances in OKLab (Ottosson, 2020), 100 from black to white, between colours and white, as seen."""
    rgb = np.array([to_rgb(colour) for colour in (*colours, "white")])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(VISIONS[vision])).clip(0, 1)
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.6806995, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    seen = 100 * np.cbrt(linear @ np.transpose(cones)) @ np.transpose(lab)
    return np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(len(seen))


@pytest.mark.parametrize(
    ("vision", "any_two", "touching"), [("full", 14, 21), ("protan", 8.8, 13), ("deutan", 10.2, 12.9)]
)
def test_classes_and_void_can_be_told_apart_in_every_common_colour_vision(
    vision: str, any_two: float, touching: float
):
    between = distances(PALETTE, vision)
    assert between.min() > any_two
    pairs = [(NAMES.index(a), NAMES.index(b)) for a, others in TOUCHING.items() for b in others]
    assert min(between[pair] for pair in pairs) > touching
    usual = tuple(map(matplotlib.colors.to_hex, matplotlib.colormaps["tab20"].colors[:13]))
    assert distances(usual, vision).min() < 0.6 * between.min()  # the measure is able to reject a palette


def test_more_classes_keep_the_first_colours_and_stay_distinct():
    assert class_colours(5) == PALETTE[:5]
    assert class_colours(151)[:13] == PALETTE
    assert len(set(class_colours(151))) == 151


def test_normals_are_red_to_the_right_green_upwards_blue_to_the_camera():
    axes = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 0]]).T[:, None]
    expected = [[1, 0.5, 0.5, 1], [0, 0.5, 0.5, 1], [0.5, 1, 0.5, 1], [0.5, 0, 0.5, 1], [0.5, 0.5, 1, 1]]
    colours = normal_map(axes)[0]
    np.testing.assert_array_equal(colours[:5], expected)
    assert colours[5, 3] == 0


def test_the_png_keeps_the_colours_that_carry_meaning():
    figure = scene_panels(SAMPLES, NAMES)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    full, small = (
        np.asarray(Image.open(source).convert("RGB")).astype(int) @ (65536, 256, 1)
        for source in (file, io.BytesIO(figure.png()))
    )
    assert len(np.unique(full)) > 2000
    assert len(np.unique(small)) <= 256
    for colour in (*PALETTE, "#ffffff"):
        here = full == int(colour[1:], 16)
        assert here.sum() > 100
        assert (small[here] == int(colour[1:], 16)).all(), colour


# Panels


def test_a_figure_has_one_legend_of_what_occurs_and_one_bar_for_all_depths():
    near, far = torch.full((4, 6), 2.0), torch.full((4, 6), 7.0)
    labels = torch.full((4, 6), 4)
    rows = [[Panel("labels", labels, "truth"), Panel("depth", near, "near"), Panel("depth", far, "far")]]
    figure = grid(rows, class_names=NAMES)
    assert legend_of(figure) == ["floor"]
    assert [ax.get_title() for ax in figure.axes[:3]] == ["truth", "near", "far"]
    assert figure.axes[1].images[0].get_clim() == figure.axes[2].images[0].get_clim() == (2, 7)
    assert [ax.get_ylabel() for ax in figure.axes[3:]] == ["depth (m)"]
    labels[0, 0] = VOID
    assert legend_of(grid(rows, class_names=NAMES)) == ["floor", "void, unknown"]
    ranged = grid(rows, class_names=NAMES, depth_range=(0.0, 10.0))
    assert ranged.axes[1].images[0].get_clim() == (0, 10)


def test_errors_of_another_unit_have_a_bar_of_their_own_that_starts_at_zero():
    errors = [
        Panel("error", np.full((4, 6), value), unit=unit) for value, unit in ((3.0, "m"), (90.0, "degrees"))
    ]
    figure = grid([errors])
    assert [ax.get_ylabel() for ax in figure.axes[2:]] == ["error (degrees)", "error (m)"]
    assert [ax.images[0].get_clim() for ax in figure.axes[:2]] == [(0, 3), (0, 90)]


def test_unknown_depth_is_left_to_the_hatched_ground():
    figure = draw(SAMPLES[0], "depth", NAMES)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown(figure.axes[0])), SAMPLES[0]["depth"].numpy() == 0)
    assert figure.axes[0].patch.get_hatch()


def test_boxes_lie_on_the_edges_of_their_pixels():
    figure = draw(SAMPLES[0], "boxes", NAMES)
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    corners = [
        [box.get_x(), box.get_y(), box.get_x() + box.get_width(), box.get_y() + box.get_height()]
        for box in boxes
    ]
    np.testing.assert_allclose(np.array(corners) + 0.5, SAMPLES[0]["boxes"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["chair", "window"]


def test_mistakes_are_the_known_pixels_that_differ():
    sample = Sample(image=SAMPLES[0]["image"][:, :1, :4], labels=tv_tensors.Mask([[0, 1, 2, VOID]]))
    figure = prediction_panels([sample], "labels", {"net": torch.tensor([[[0, 2, 2, 2]]])}, NAMES)
    assert [ax.get_title() for ax in figure.axes] == ["image", "truth", "net", "net\nerror"]
    assert shown(figure.axes[3]).tolist() == [[0, 1, 0, None]]


def test_depth_errors_are_metres_and_errors_of_normals_degrees():
    image = SAMPLES[0]["image"][:, :1, :3]
    deep = Sample(image=image, depth=Depth([[2.0, 4.0, 0.0]]))
    figure = prediction_panels([deep], "depth", {"net": torch.tensor([[[1.5, 7.0, 3.0]]])})
    assert shown(figure.axes[3]).tolist() == [[0.5, 3, None]]
    flat = Sample(image=image, normals=Normals([[[0.0, 0, 0]], [[0, -1, 0]], [[-1, 0, 0]]]))
    guess = torch.tensor(
        [[[[0.0, 5.0, 1.0]], [[0, 0, 0]], [[-3, 0, 0]]]]
    )  # right, a right angle off, unknown
    figure = prediction_panels([flat], "normals", {"net": guess})
    np.testing.assert_allclose(shown(figure.axes[3]).filled(-1), [[0, 90, -1]], atol=1e-6)


def test_unlabelled_samples_show_predictions_and_no_errors():
    bare = [Sample(image=sample["image"]) for sample in SAMPLES]
    figure = prediction_panels(bare, "depth", {"net": torch.ones(3, 48, 64)})
    assert [ax.get_title() for ax in figure.axes] == ["image", "net", *[""] * 5]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_extremes_are_drawn(size: tuple[int, int]):
    height, width = size
    unknown = Sample(
        image=tv_tensors.Image(torch.zeros(3, height, width)),
        labels=tv_tensors.Mask(torch.full(size, VOID)),
        depth=Depth(torch.zeros(size)),
        normals=Normals(torch.zeros(3, height, width)),
        boxes=tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
        box_labels=torch.zeros(0, dtype=torch.int64),
    )
    for figure in (scene_panels([unknown], NAMES), *(draw(unknown, view, NAMES) for view in VIEWS)):
        assert figure.png()
    assert legend_of(draw(unknown, "depth", NAMES)) == ["void, unknown"]
    assert prediction_panels([unknown], "depth", {"net": torch.zeros(1, *size)}).png()
    assert grid(
        [[Panel("depth", torch.full(size, 3.0)), Panel("error", np.full(size, np.nan), unit="m")]]
    ).png()
    assert grid([[Panel("labels", torch.full(size, 150))]], class_names=[str(k) for k in range(151)]).png()


def test_panels_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="no panel of kind 'colour': choose one of image, labels"):
        Panel("colour", torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"'image' needs data of shape 3×H×W, got \(4, 4, 3\)"):
        Panel("image", torch.zeros(4, 4, 3))
    with pytest.raises(ValueError, match=r"'depth' needs data of shape H×W, got \(1, 4, 4\)"):
        Panel("depth", torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="both boxes and box_labels"):
        Panel("image", torch.zeros(3, 4, 4), boxes=torch.zeros(1, 4))
    panel = Panel("depth", torch.ones(4, 4))
    for rows in ([], [[]], [[panel], [panel, panel]]):
        with pytest.raises(ValueError, match="rows of one length"):
            grid(rows)
    with pytest.raises(ValueError, match="rows of one length"):
        scene_panels([], NAMES)
    with pytest.raises(ValueError, match=r"cannot show 'labels' of a sample that holds \['image'\]"):
        scene_panels([SAMPLES[0], Sample(image=SAMPLES[1]["image"])], NAMES)
    with pytest.raises(ValueError, match="3 samples need as many predictions"):
        prediction_panels(SAMPLES, "depth", {"net": torch.ones(2, 48, 64)})
    with pytest.raises(ValueError, match="cannot show 'smell' of a sample"):
        draw(SAMPLES[0], "smell", NAMES)
    with pytest.raises(ValueError, match="needs samples with a common view"):
        scene_browser([], NAMES)


# Curves and diagrams


def test_learning_curves_draw_the_rows_that_have_the_key():
    sparse = [{"epoch": 1.0}, {"epoch": 2.0, "loss": 0.5}, {"epoch": 4.0, "loss": 0.25}]
    figure = learning_curves({"full": ROWS, "sparse": sparse}, "loss", label="loss (nats)")
    first, second = figure.axes[0].lines
    np.testing.assert_allclose(first.get_xydata(), [(e, 2 / e) for e in range(1, 6)])
    np.testing.assert_allclose(second.get_xydata(), [(2, 0.5), (4, 0.25)])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("epoch", "loss (nats)")
    assert "sparse from 0.5 to 0.25" in figure.alt
    assert (first.get_linestyle(), first.get_marker()) != (second.get_linestyle(), second.get_marker())
    with pytest.raises(ValueError, match=r"'full' has both 'mIoU' and 'epoch': it has \['epoch', 'loss'\]"):
        learning_curves({"full": ROWS}, "mIoU")


def test_block_losses_mark_the_branch_that_they_are_given():
    losses = {"seg": [0.1, 0.9, 0.8, 0.7], "depth": [float("nan"), float("nan"), 0.2, 0.3]}
    figure = block_losses(losses, {"seg": 4, "depth": 3}, decoder_from=3)
    for ax, (task, values), point in zip(figure.axes, losses.items(), (4, 3), strict=True):
        curve, star = ax.lines
        np.testing.assert_allclose(curve.get_xydata(), list(enumerate(values, start=1)))
        np.testing.assert_allclose(star.get_xydata(), [(point, values[point - 1])])
        assert f"branch: n = {point}" in [text.get_text() for text in ax.get_legend().get_texts()]
        shade = ax.patches[0]
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (2.5, 4.5)
        assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (task, "block n", "held-out loss")
    for branch in ({"seg": 0}, {"seg": 5}, {"depth": 1}):
        with pytest.raises(ValueError, match=r"seg needs a branch among its blocks 1\.\.4"):
            block_losses({"seg": losses["seg"]}, branch, decoder_from=3)


def boxes_of(figure: Picture) -> dict[tuple[float, float], FancyBboxPatch]:
    """{(centre x, centre y): block}."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    return {
        (round(p.get_x() + p.get_width() / 2, 6), round(p.get_y() + p.get_height() / 2, 6)): p for p in found
    }


def test_branch_diagram_draws_the_shared_blocks_and_each_branch():
    channels, pools = (8, 16, 32, 32, 16, 8), (True, False, True)
    branch = {"seg": 5, "depth": 4, "normals": 6}
    figure = branch_diagram(channels, branch, pools=pools, names={task: f"{task} net" for task in branch})
    blocks = boxes_of(figure)
    rows = {0: range(1, 7), 1: range(6, 7), -1: range(5, 7)}  # the trunk, segmentation above, depth below
    assert set(blocks) == {(n, row) for row, numbers in rows.items() for n in numbers}
    # Resolutions after each block, walked through one by one: down by a pool, up by its mirror.
    sizes, size = [], 64
    for pool in pools:
        sizes.append(size := size // 2 if pool else size)
    for pool in reversed(pools):
        sizes.append(size := size * 2 if pool else size)
    heights = [blocks[n, 0].get_height() for n in range(1, 7)]
    assert [sizes[a] < sizes[b] for a in range(6) for b in range(6)] == [
        heights[a] < heights[b] for a in range(6) for b in range(6)
    ]
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert {f"{n}\n{c}" for n, c in enumerate(channels, start=1)} <= set(texts)
    assert {"seg", "from seg net", "depth", "normals"} <= set(texts)
    with pytest.raises(ValueError, match=r"3 pool flags and the branches \{'seg': 7\} do not fit 6 blocks"):
        branch_diagram(channels, {"seg": 7}, pools=pools, names={"seg": "SegNet"})
    with pytest.raises(ValueError, match="2 pool flags"):
        branch_diagram(channels, {"seg": 5}, pools=pools[:2], names={"seg": "SegNet"})


@pytest.mark.parametrize("n", [1, 4, 6])
def test_projection_diagram_replaces_the_first_n_blocks_of_each_teacher(n: int):
    blocks = boxes_of(projection_diagram(n, 6, {"SegNet": "s", "DepthNet": "d"}))
    dashed = {at for at, block in blocks.items() if block.get_linestyle() == "--"}
    assert dashed == {(m, row) for m in range(1, n + 1) for row in (1, -1)}
    assert set(blocks) - dashed == {(m, row) for m in range(n + 1, 7) for row in (1, -1)} | {
        (m, 0) for m in range(1, n + 1)
    }
    learnt = [at for at, block in blocks.items() if block.get_facecolor() == blocks[n, 0].get_facecolor()]
    assert learnt == [(n, 0)]


def test_projection_diagram_refuses_a_block_that_does_not_exist():
    for n in (0, 7):
        with pytest.raises(ValueError, match=f"block n = {n} of 6"):
            projection_diagram(n, 6, {"SegNet": "s"})


# Tables


def test_the_best_of_each_column_is_marked_by_text():
    rows = {
        "teacher": {"mIoU": 0.36849, "abs rel": 0.219, "parameters": "0.80 M", "seconds": 64.2},
        "student": {"mIoU": 0.36851, "abs rel": 0.225, "parameters": "0.47 M", "seconds": 181.0},
        "chance": {"mIoU": float("nan")},
    }
    table = results_table(rows, {"mIoU": "max", "abs rel": "min"}, digits={"mIoU": 4, "seconds": 0})
    assert list(table.columns) == ["mIoU ↑", "abs rel ↓", "parameters", "seconds"]
    assert table.to_numpy().tolist() == [
        ["0.3685 *", "0.219 *", "0.80 M", "64"],
        ["0.3685 *", "0.225", "0.47 M", "181"],  # prints like the teacher's: it shares the star
        ["–", "–", "–", "–"],
    ]
    finer = results_table(rows, {"mIoU": "max"}, digits=5)
    assert finer["mIoU ↑"].tolist() == ["0.36849", "0.36851 *", "–"]
    with pytest.raises(ValueError, match="'IoU': 'max'"):
        results_table(rows, {"IoU": "max"})
    with pytest.raises(ValueError, match="'mIoU': 'high'"):
        results_table(rows, {"mIoU": "high"})


def test_counts_as_text():
    assert (in_millions(29_450_000), in_billions(310_000_000)) == ("29.45 M", "0.31 G")


# Notebooks


def test_browser_offers_the_views_that_all_scenes_hold():
    browser = scene_browser([SAMPLES[0], Sample(image=SAMPLES[1]["image"], depth=SAMPLES[1]["depth"])], NAMES)
    assert isinstance(browser, ipywidgets.VBox)
    controls, picture = browser.children
    slider, view = controls.children
    assert view.options == ("image", "depth")
    assert (slider.min, slider.max, slider.continuous_update) == (0, 1, False)
    assert picture.layout.height.endswith("px")


def test_a_kernel_shows_each_picture_exactly_once():
    setup = """
import torch
from kamal_lib.viz.panels import Panel, grid
from kamal_lib.viz.widgets import scene_browser
figure = grid([[Panel("depth", torch.ones(4, 4), "one metre")]])
figure"""
    widget = """
browser = scene_browser([{"image": torch.rand(3, 4, 4)}, {"image": torch.rand(3, 4, 4)}], [])
browser"""
    move = """
browser.children[0].children[0].value = 1
print([sorted(output["data"]) for output in browser.children[1].outputs])"""
    cells = [setup, "%matplotlib inline\nimport matplotlib.pyplot", "figure", widget, move]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    for cell in (book.cells[0], book.cells[2]):  # before and after pyplot's inline backend is there
        (output,) = cell.outputs
        assert set(output.data) == {"image/png", "text/plain"}
        assert output.metadata["image/png"]["alt"] == "1 × 1 pictures: one metre."
    assert book.cells[0].outputs[0].data == book.cells[2].outputs[0].data  # ours, not pyplot's larger one
    assert book.cells[4].outputs[0].text.strip() == "[['image/png', 'text/plain']]"
