"""Plans of comparisons: the configuration's checks, and the runs that come out of it."""

from pathlib import Path

import pytest
import yaml

from ept.compare.config import ComparisonConfig, load_comparison, rates_of
from ept.compare.execute import Outcome
from ept.compare.plan import best_rates, plan
from ept.runs.config import RunConfig

SETTINGS = ("model.name_or_path=some/model", "compare.tasks=[glue/sst2]", "output_dir=out", "compare.seeds=[0, 1]")


def comparison(*overrides):
    return load_comparison(None, [*SETTINGS, *overrides])


def test_methods_times_tasks_times_seeds_times_rates():
    config = comparison(
        "compare.tasks=[glue/sst2, super_glue/cb]",
        "compare.methods=[pt, ept]",
        "compare.learning_rates={ept: [0.1, 2e-2, 1e-2], default: [0.3]}",
        "compare.low_rank_learning_rates=[1e-3, 5e-3]",
    )
    runs = plan(config)
    assert len(runs) == 2 * 2 * (1 + 3 * 2)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.folder.parent for run in runs} == {Path("out/runs")}
    first = runs[0].config
    assert (first.method.name, first.data.task, first.seed) == ("pt", "glue/sst2", 0)
    assert first.training.learning_rate == 0.3
    assert [run.rates for run in runs if run.method == "ept"][:3] == [(0.1, 0.001), (0.1, 0.005), (0.02, 0.001)]
    assert [run.config for run in plan(config)] == [run.config for run in runs]


def test_rates_of_methods_with_one_kind_of_parameter():
    compare = comparison("compare.methods=[pt, dept, lora]", "compare.low_rank_learning_rates=[1, 2]").compare
    assert rates_of(compare, "dept", (9.0, 8.0)) == [(9.0, 1.0), (9.0, 2.0)]
    assert rates_of(compare, "lora", (9.0, 8.0)) == [(9.0, 8.0)]
    named = comparison("compare.low_rank_learning_rates={pt: [3]}").compare  # prompt tuning has nothing else
    assert rates_of(named, "pt", (9.0, 8.0)) == [(9.0, 8.0)]


def test_a_changed_setting_is_another_run_and_the_folder_is_not():
    one, other = plan(comparison())[0], plan(comparison("training.max_steps=7"))[0]
    moved = plan(comparison("output_dir=elsewhere"))[0]
    assert one.folder != other.folder
    assert one.folder.name == moved.folder.name


@pytest.fixture
def places(tmp_path):
    """Makes two folders with a model and data of the same names each, and a link to the first one."""
    for name in ("here", "there"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "reviews.csv").write_text("text,label\n")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    return tmp_path


def folder_from(place, monkeypatch, model="model", data="reviews.csv"):
    monkeypatch.chdir(place)
    given = [f"model.name_or_path={model}", f"data.train_file={data}", "compare.tasks=[]", "compare.methods=[pt]"]
    return plan(comparison(*given, f"output_dir={place.parent / 'out'}"))[0].folder


def test_a_run_is_the_same_however_its_paths_are_written(places, monkeypatch):
    here, written = places / "here", {}
    written["as names"] = folder_from(here, monkeypatch)
    written["from another folder"] = folder_from(places / "there", monkeypatch, "../here/model", "../here/reviews.csv")
    written["in full"] = folder_from(places / "there", monkeypatch, here / "model", here / "reviews.csv")
    written["through a link"] = folder_from(places / "link", monkeypatch, "./model", places / "link" / "reviews.csv")
    assert set(written.values()) == {written["as names"]}, written


def test_other_files_of_the_same_name_are_another_run(places, monkeypatch):
    folders = [folder_from(places / name, monkeypatch) for name in ("here", "there")]
    assert folders[0] != folders[1]


def test_a_run_under_an_older_name_is_found_by_its_configuration(places, monkeypatch):
    """A key that is newer than the run has had its usual value; another learning rate is another run."""
    run = plan(comparison("compare.methods=[pt]", f"output_dir={places}"))[0]
    values = run.config.to_dict()
    del values["model"]["fast_frozen"]
    older = run.folder.with_name("glue_sst2-pt-seed0-0123456789")
    older.mkdir(parents=True)
    (older / "config.yaml").write_text(yaml.safe_dump(values))
    (older.parent / "damaged").mkdir()
    (older.parent / "damaged" / "config.yaml").write_text("{")
    (again,) = plan(comparison("compare.methods=[pt]", f"output_dir={places}", "training.eval_batch_size=3"), [0])
    (other,) = plan(comparison("compare.methods=[pt]", f"output_dir={places}", "training.learning_rate=3"), [0])
    assert again.folder == Path(again.config.output_dir) == older
    assert other.folder.parent == older.parent
    assert other.folder != older


def test_sweeps_vary_one_setting_around_the_configuration():
    config = comparison(
        "compare.methods=[pt, dept, ept, lora]",
        "compare.seeds=[0]",
        "compare.sweep={num_virtual_tokens: [5, 10], num_spaces: [2], r: [3], k_shot: [16], model: [a, some/model]}",
        "method.budget=50000",
    )
    found = [(run.setting, run.method) for run in plan(config)]
    methods = ["pt", "dept", "ept", "lora"]
    assert found == [
        *[("", name) for name in methods],
        *[(f"num_virtual_tokens={value}", name) for value in (5, 10) for name in methods[:3]],
        ("num_spaces=2", "ept"),
        *[("r=3", name) for name in methods[1:]],
        *[(setting, name) for setting in ("k_shot=16", "model=a", "model=some/model") for name in methods],
    ]
    by = {(run.setting, run.method): run for run in plan(config)}
    assert by["num_virtual_tokens=10", "pt"].config.method.num_virtual_tokens == 10
    assert by["k_shot=16", "lora"].config.data.k_shot == 16
    assert by["model=a", "ept"].config.model.name_or_path == "a"
    assert all(run.config.method.budget == 50000 for run in by.values())
    assert by["model=some/model", "ept"].folder == by["", "ept"].folder  # one run at two points


def test_a_shared_setting_goes_to_the_methods_that_have_it():
    runs = plan(comparison("compare.methods=[pt, dept, ept]", "method.r=7", "method.num_spaces=2"))
    assert [run.config.method.r for run in runs[:3]] == [None, 7, 7]
    assert [run.config.method.num_spaces for run in runs[:3]] == [None, None, 2]


def test_models_alone_without_a_base_model():
    config = comparison("model.name_or_path=null", "compare.sweep={model: [a, b], r: [2]}", "compare.methods=[ept]")
    found = [(run.setting, run.config.model.name_or_path) for run in plan(config, [0])]
    assert found == [("model=a", "a"), ("model=b", "b"), ("r=2", "a")]


def test_folder_of_each_task(tmp_path):
    for name in ("glue/sst2", "glue/rte"):
        (tmp_path / name).mkdir(parents=True)
    data = f"data.data_dir={tmp_path}"
    runs = plan(comparison(data, "compare.tasks=[glue/sst2, glue/rte]", "compare.methods=[pt]"), [0])
    assert [run.config.data.data_dir for run in runs] == [str(tmp_path / "glue/sst2"), str(tmp_path / "glue/rte")]
    alone = plan(comparison(f"data.data_dir={tmp_path}/glue/rte", "compare.tasks=[glue/rte]"))
    assert alone[0].config.data.data_dir == str(tmp_path / "glue/rte")
    with pytest.raises(ValueError, match="has no folder glue/cola: one folder per task is needed"):
        plan(comparison(data, "compare.tasks=[glue/sst2, glue/cola]"))


def test_what_is_trained_by_default_is_compared_by_default_beside_the_papers_form():
    assert {RunConfig().method.name, "ept", "pt", "dept"} == set(ComparisonConfig().compare.methods)


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("compare_*.yaml")))
def test_the_examples_give_every_method_as_many_tries(name):
    config = load_comparison(EXAMPLES / name, ["model.name_or_path=some/model", "output_dir=out"])
    runs = plan(config)
    tries = {method: sum(run.method == method for run in runs) for method in config.compare.methods}
    assert len(set(tries.values())) == 1, tries
    assert {run.config.method.budget for run in runs} == {config.method.budget}


def test_a_part_of_the_methods_runs_with_the_same_file():
    """This allows running the methods of a comparison in several processes: rates of absent methods are ignored."""

    def folders(*overrides):
        given = ["model.name_or_path=some/model", "output_dir=out", *overrides]
        return {run.folder for run in plan(load_comparison(EXAMPLES / "compare_sst2.yaml", given))}

    parts = [folders(f"compare.methods=[{method}]") for method in ("ept", "pt", "dept")]
    assert set.union(*parts) == folders()


@pytest.mark.parametrize("override, message", [
    ("compare.methods=[ept, depth]", "unknown method 'depth': did you mean 'dept'"),
    ("compare.methods=[]", "compare.methods is empty"),
    ("compare.seeds=[1, 1]", "compare.seeds lists a value twice"),
    ("compare.learning_rates=[0.1, 0.1]", "compare.learning_rates lists a value twice"),
    ("compare.sweep={r: [2, 4, 2]}", r"compare.sweep.r lists a value twice: \[2, 4, 2\]"),
    ("compare.seeds=[-1]", "must not be negative"),
    ("compare.learning_rate_seeds=3", r"must be 1 \.\. 2"),
    ("compare.learning_rates={ept: []}", "compare.learning_rates of ept"),
    ("compare.learning_rates={lorra: [0.1]}", "unknown method 'lorra': did you mean 'lora'"),
    ("compare.learning_rates=[0.1, 0]", "give numbers greater than 0"),
    ("compare.learning_rates=[fast]", "compare.learning_rates: expected a list of numbers or"),
    ("compare.learning_rates={1: [0.1]}", "compare.learning_rates: expected a list of numbers or a mapping to lists"),
    ("compare.sweep={1: [2]}", "compare.sweep: expected a mapping to lists of values"),
    ("compare.sweep={k_shots: [1]}", "unknown sweep 'k_shots': did you mean 'k_shot'"),
    ("compare.sweep={r: []}", "compare.sweep.r is empty"),
    ("compare.sweep={k_shot: [16, null]}", "compare.sweep.k_shot holds null: give a value"),
    ("compare.executor=slurm", "compare.executor: expected one of local, ray"),
    ("compare.cpus_per_run=0", "must be greater than 0, got 0"),
    ("compare.seed=[1]", "unknown key compare.seed: did you mean compare.seeds"),
])  # fmt: skip
def test_refused(override, message):
    with pytest.raises(ValueError, match=message):
        comparison(override)


@pytest.mark.parametrize("override, message", [
    ("output_dir=null", "give --output DIR"),
    ("compare.tasks=[]", "no task: set compare.tasks"),
    ("model.name_or_path=null", "model.name_or_path is not set"),
    ("compare.sweep={r: [few]}", "method.r: expected a whole number"),
    ("compare.sweep={k_shot: [0]}", "data.k_shot must be greater than 0"),
])  # fmt: skip
def test_no_plan(override, message):
    with pytest.raises(ValueError, match=message):
        plan(comparison(override))


def test_rates_with_the_best_mean_on_validation_win():
    config = comparison("compare.methods=[pt]", "compare.learning_rates=[0.1, 0.2, 0.3, 0.4]")
    runs = plan(config)
    validation = {0.1: (0.9, 0.5), 0.2: (0.8, 0.7), 0.3: (0.75, 0.75), 0.4: (1.0, None)}
    outcomes = {}
    for run in runs:
        score = validation[run.rates[0]][run.seed]
        outcomes[run.folder] = Outcome(run.folder, None if score is None else {"best_validation": score})
    (chosen,) = best_rates(runs, outcomes).values()
    assert chosen[0] == 0.2  # of equals the first; 0.4 failed with a seed
    failed = {run.folder: Outcome(run.folder, None, "no") for run in runs}
    assert best_rates(runs, failed) == {}
    one_left = {**failed, runs[3].folder: outcomes[runs[3].folder]}
    assert [rates[0] for rates in best_rates(runs, one_left).values()] == [0.4]
