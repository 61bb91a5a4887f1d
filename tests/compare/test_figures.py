"""Each figure is drawn if its runs exist, and published results only on request."""

from dataclasses import replace
from importlib.resources import files

import matplotlib.image
import pytest

from ept.compare import figures
from ept.compare.figures import draw, side_by_side
from ept.compare.published import published_scores
from ept.compare.tables import MethodSummary, Setting, interval, seed_means
from ept.tasks import TASKS


def setting(sweep, value, scores, parameters=1000):
    methods = [
        MethodSummary(name, parameters, parameters + 10 * i, {}, {}, interval(values), {}, 3.0, {})
        for i, (name, values) in enumerate(scores.items())
    ]
    return Setting(sweep, value, ["glue/sst2"], methods, [], [], 3, "")


def scores(base):
    return {"pt": [base, base + 0.05], "dept": [base + 0.02, base + 0.03], "ept": [base + 0.1, base + 0.2]}


BASE = setting(None, None, scores(0.6))
# the figure's file, the points it needs
FIGURES = {
    "score_against_parameters.png": [BASE],
    "methods_by_model.png": [setting("model", name, scores(0.5)) for name in ("org/small", "org/large")],
    "score_against_k_shot.png": [setting("k_shot", k, scores(0.4)) for k in (32, 8, 16)],
    "score_against_num_virtual_tokens.png": [setting("num_virtual_tokens", s, scores(0.6), 100 * s) for s in (10, 40)],
    "score_against_num_spaces.png": [setting("num_spaces", K, {"ept": [0.7, 0.8]}) for K in (0, 1, 4)],
    "score_against_r.png": [setting("r", r, {"ept": [0.7], "dept": [0.6]}) for r in (2, 8)],
}
ALSO_SIZES = {"score_against_num_virtual_tokens.png", "score_against_num_spaces.png", "score_against_r.png"}


@pytest.mark.parametrize("name", FIGURES)
def test_drawn_when_its_runs_are_there(name, tmp_path):
    found = {file.name for file in draw(FIGURES[name], tmp_path)}
    assert found == {name} | ({"score_against_parameters.png"} if name in ALSO_SIZES else set())
    assert {file.name for file in tmp_path.iterdir()} == found
    picture = matplotlib.image.imread(tmp_path / name)
    assert picture.shape[0] > 400
    assert picture[..., :3].std() > 0.01  # not blank


def test_all_together_and_nothing(tmp_path):
    everything = [point for points in FIGURES.values() for point in points]
    assert {file.name for file in draw(everything, tmp_path)} == set(FIGURES)
    assert draw([], tmp_path) == []
    failed = Setting("k_shot", 4, ["glue/sst2"], [], [], ["pt"], 1, "")
    assert draw([failed], tmp_path) == []


def test_scores_over_steps_are_drawn_where_there_are_several(tmp_path):
    methods = [replace(method, curve={60: 0.5, 120: 0.6 + 0.1 * i}) for i, method in enumerate(BASE.methods)]
    found = {file.name for file in draw([replace(BASE, methods=methods)], tmp_path)}
    assert found == {"score_against_parameters.png", "score_over_steps.png"}
    assert matplotlib.image.imread(tmp_path / "score_over_steps.png")[..., :3].std() > 0.01  # not blank


def test_a_seed_is_drawn_where_it_has_every_task():
    scores = {("a", 0): 0.5, ("b", 0): 0.7, ("a", 1): 0.9, ("a", 2): 0.6, ("b", 2): 0.6}
    assert seed_means(scores, "ab") == pytest.approx({0: 0.6, 2: 0.6})


def test_one_seed_beside_several_has_no_bar_of_its_rows(tmp_path, monkeypatch):
    titles = []
    plot = figures.plot
    monkeypatch.setattr(figures, "plot", lambda file, title, **how: titles.append(title) or plot(file, title, **how))
    pictures = []
    for mean in (interval([0.6]), interval([0.6], 0.01)):
        single = replace(BASE.methods[0], mean=mean)
        (file,) = draw([replace(BASE, methods=[single, *BASE.methods[1:]])], tmp_path)
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1]
    assert set(titles) == {"glue/sst2, 1 to 2 seeds, bars: 95 % interval within 0 .. 100"}


def test_methods_at_one_budget_stand_side_by_side():
    """Their parameters differ by a few: drawn at their true places, one would hide the other."""
    sizes = [1000, 990, 50_000, 995]
    places = side_by_side(sizes, step=0.01)
    assert places[2] == 50_000
    assert [place / size for place, size in zip(places, sizes)] == pytest.approx([10**-0.01, 1, 1, 10**0.01])
    many = side_by_side([1000] * 40, step=0.1)
    assert many == sorted(many)
    assert 500 < many[0] < many[-1] < 2000  # within the figure


def test_published_results_are_drawn_on_request_only(tmp_path):
    (plain,) = draw([BASE], tmp_path)
    before = plain.read_bytes()
    (marked,) = draw([BASE], tmp_path, published=True)
    assert marked.read_bytes() != before


def test_published_table_agrees_with_its_own_means():
    """GLUE and SuperGLUE means as the sources print them."""
    glue = [name for name in TASKS if name.startswith("glue/")]
    super_glue = [name for name in TASKS if name.startswith("super_glue/")]
    means = {
        "Fine-tuning": (84.9, 73.9), "Adapter": (84.5, 75.7), "AdapterDrop": (84.4, 75.3), "BitFit": (83.3, 72.5),
        "LoRA": (85.3, 76.5), "HyperFormer (multi-task)": (84.8, 75.4), "PT (by MPT)": (72.2, 57.8),
        "PT (by DePT)": (84.8, 60.0), "SPoT": (82.3, 62.9), "ATTEMPT": (83.4, 70.5), "MPT": (85.6, 74.1),
        "DePT": (85.9, 76.5), "TPT": (85.6, 77.2), "ACCEPT": (87.9, 78.3),
    }  # fmt: skip
    found = {name: score for name, _, score in published_scores(glue)}
    found_super = {name: score for name, _, score in published_scores(super_glue)}
    for name, (wanted, wanted_super) in means.items():
        assert found[name] == pytest.approx(wanted, abs=0.11), name
        assert found_super[name] == pytest.approx(wanted_super, abs=0.11), name
    assert "LST" in found
    assert "LST" not in found_super
    header = files("ept.compare").joinpath("published_t5_base.csv").read_text("utf-8").splitlines()[0]
    assert set(header.split(",")) == {"method", "parameters", "source", *TASKS}
    assert published_scores(["local"]) == []
