"""A run's folder: only whole checkpoints count, whatever a killed process left behind, and a folder serves one recipe."""

import json
import shutil

import pytest

from cache2cache.errors import TrainingError
from cache2cache.train import checkpoints
from cache2cache.train.checkpoints import Checkpoint, complete, folder_of, held, prune, to_resume


def save(output, step: int, *, whole: bool = True, max_steps: int = 100, stop: bool = False, best: int | None = None):
    folder = folder_of(output, step)
    folder.mkdir(parents=True)
    control = {"args": {"should_training_stop": stop}}
    state = {"global_step": step, "max_steps": max_steps, "best_global_step": best}
    state["stateful_callbacks"] = {"TrainerControl": control}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if whole:
        complete(folder, 2, "rows")
    return folder


def test_the_last_whole_checkpoint_counts_by_its_step(tmp_path):
    assert to_resume(tmp_path) is None
    for step in (8, 24, 100):
        save(tmp_path, step)
    save(tmp_path, 108, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    found = to_resume(tmp_path)
    assert found is not None and found.step == 100 and found.processes == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "got no trainer_state.json"),
        (lambda path: path.write_text(path.read_text()[:9]), "got trainer_state.json of 9 bytes"),
        (lambda path: path.with_name("complete.json").write_text("{"), "got complete.json: "),
    ],
)
def test_nothing_goes_on_from_a_damaged_checkpoint(tmp_path, damage, said):
    save(tmp_path, 8)
    damage(save(tmp_path, 16) / "trainer_state.json")
    with pytest.raises(TrainingError, match=rf"checkpoint-16 is damaged; {said}.*delete it to go on"):
        to_resume(tmp_path)
    shutil.rmtree(folder_of(tmp_path, 16))
    found = to_resume(tmp_path)
    assert found is not None and found.step == 8


@pytest.mark.parametrize(
    ("step", "stop", "ended"), [(99, False, False), (100, False, True), (40, True, True), (40, False, False)]
)
def test_a_run_has_ended_at_its_last_step_or_when_it_was_stopped(tmp_path, step, stop, ended):
    assert Checkpoint(save(tmp_path, step, stop=stop)).ended == ended


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, [8, 16, 24, 32], [32]),
        (1, [8, 8, 8, 8], [8, 32]),
        (2, [8, 16, 16, 32], [16, 24, 32]),
        (9, [8, 16, 24, 32], [8, 16, 24, 32]),
        (1, [None] * 4, [32]),
    ],
)
def test_the_newest_are_kept_and_what_was_best_at_each_of_them(tmp_path, keep, best, left):
    """Where the newest is deleted, the one before it is gone on from."""
    for step, so_far in zip((8, 16, 24, 32), best, strict=True):
        save(tmp_path, step, best=so_far)
    prune(tmp_path, keep)
    assert sorted(int(x.name.removeprefix("checkpoint-")) for x in tmp_path.iterdir()) == left


def test_a_checkpoint_that_is_being_deleted_is_no_longer_whole(tmp_path, monkeypatch):
    for step in (8, 16):
        save(tmp_path, step)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert not (folder_of(tmp_path, 8) / "complete.json").exists()


def test_what_a_killed_process_left_behind_is_removed(tmp_path, recipe):
    with held(tmp_path / "out", recipe(), resume=False):
        pass
    whole = save(tmp_path / "out", 8)
    save(tmp_path / "out", 16, whole=False)
    (tmp_path / "out" / ".fuser.partial-x1").mkdir()
    with held(tmp_path / "out", recipe(), resume=True):
        folders = [x for x in (tmp_path / "out").iterdir() if x.is_dir()]
    assert folders == [whole]


@pytest.mark.parametrize("resume", [False, True])
def test_where_nothing_was_kept_another_run_may_begin(tmp_path, recipe, resume):
    """A run that ended at once, with a mistyped name, or before its first checkpoint."""
    with held(tmp_path, recipe(seed=1), resume=False):
        save(tmp_path, 8, whole=False)
    with held(tmp_path, recipe(seed=2), resume=resume):
        assert not folder_of(tmp_path, 8).exists()
    assert json.loads((tmp_path / checkpoints.RECIPE).read_text())["seed"] == 2


def test_a_folder_with_a_run_is_refused_unless_it_goes_on(tmp_path, recipe):
    with held(tmp_path, recipe(), resume=False):
        save(tmp_path, 8)
    with pytest.raises(TrainingError, match="holds a run; got .*--resume"), held(tmp_path, recipe(), resume=False):
        pass
    with held(tmp_path, recipe(), resume=True):
        pass


def test_another_recipe_is_refused_and_its_differences_named(tmp_path, recipe):
    with held(tmp_path, recipe(), resume=False):
        save(tmp_path, 8)
    other = recipe(optim={"learning_rate": 0.5}, seed=7)
    with pytest.raises(TrainingError) as error, held(tmp_path, other, resume=True):
        pass
    assert "optim.learning_rate was 0.01, is 0.5" in str(error.value) and "seed was 0, is 7" in str(error.value)
    with held(tmp_path, recipe(), resume=True):  # and the folder still belongs to the first
        pass


def test_a_run_begins_with_resume_too(tmp_path, recipe):
    with held(tmp_path / "out", recipe(), resume=True):
        assert json.loads((tmp_path / "out" / "recipe.json").read_text())["receiver"] == "tiny-receiver"


@pytest.mark.parametrize("left", ["checkpoint-8", "fuser"])
def test_results_without_a_recipe_are_not_written_over(tmp_path, recipe, left):
    (tmp_path / left).mkdir()
    with pytest.raises(TrainingError, match=f"{left} but no recipe.json"), held(tmp_path, recipe(), resume=True):
        pass


def test_a_damaged_recipe_is_named(tmp_path, recipe):
    save(tmp_path, 8)
    (tmp_path / checkpoints.RECIPE).write_text("{")
    with pytest.raises(TrainingError, match="recipe.json is damaged"), held(tmp_path, recipe(), resume=True):
        pass


def test_a_folder_that_another_process_writes_into_is_refused(tmp_path, recipe):
    with (
        held(tmp_path, recipe(), resume=False),
        pytest.raises(TrainingError, match="another process"),
        held(tmp_path, recipe(), resume=True),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path, recipe):
    (tmp_path / "file").touch()
    with (
        pytest.raises(TrainingError, match="cannot be written"),
        held(tmp_path / "file" / "out", recipe(), resume=False),
    ):
        pass
