"""The command line, the recipes, and what the package may import."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.errors import ConfigError
from student_train.cli import train_student
from student_train.config import MAY_CHANGE, Recipe, load_recipe
from tests.student_train.support import environment, write_recipe
from tests.support import invoke

ROOT = Path(__file__).parents[2]


def imports(package: str) -> set[str]:
    """Top-level names that a package's modules import, anywhere in them."""
    found: set[str] = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def test_the_two_stages_never_import_each_other_and_shared_imports_neither() -> None:
    assert {"shared", "student_train"} <= imports("student_train")
    assert "cache_builder" not in imports("student_train")
    assert "student_train" not in imports("cache_builder")
    assert not imports("shared") & {"cache_builder", "student_train"}


def test_help_needs_neither_torch_nor_zarr() -> None:
    code = (
        "import sys; from student_train.cli import train_student\n"
        "try: train_student(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'zarr', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "--recipe" in done.stdout


def test_every_option_has_help() -> None:
    assert train_student.help
    for option in train_student.params:
        assert getattr(option, "help", None), option.name


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_a_pattern_that_the_shell_expanded_is_said_to_lack_its_quotes(option: str) -> None:
    result = invoke(train_student, option, "tars/shard-000000.tar", "tars/shard-000001.tar")

    assert result.exit_code == 2
    assert f"in quotes, as in {option} 'tars/shard-*.tar'" in result.stderr


def test_a_missing_option_is_a_usage_error() -> None:
    result = CliRunner().invoke(train_student, ["--data", "x.tar"])

    assert result.exit_code == 2
    assert "--student" in result.stderr


# -- recipes -------------------------------------------------------------------------------------


def test_recipe_of_stage_one_holds_the_published_values() -> None:
    recipe = load_recipe("stage1", ())

    assert (recipe.template, recipe.image_aspect, recipe.max_tokens) == ("plain", "square", 2048)
    assert (recipe.global_batch, recipe.epochs, recipe.group_by_length) == (256, 1, False)
    assert (recipe.optim.lr, recipe.optim.projector_lr) == (2e-5, 1e-3)
    assert (recipe.optim.warmup, recipe.optim.weight_decay) == (0.03, 0.0)
    assert recipe.gradient_checkpointing
    assert not recipe.train_tower


def test_recipe_of_stage_two_holds_the_published_values() -> None:
    recipe = load_recipe("stage2", ())

    assert (recipe.template, recipe.image_aspect, recipe.max_tokens) == ("v1", "pad", 2048)
    assert (recipe.global_batch, recipe.epochs, recipe.group_by_length) == (128, 1, True)
    assert (recipe.optim.lr, recipe.optim.projector_lr or recipe.optim.lr) == (4e-5, 4e-5)
    assert (recipe.optim.warmup, recipe.optim.weight_decay) == (0.03, 0.0)
    assert recipe.gradient_checkpointing
    assert not recipe.train_tower


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_shipped_recipes_weigh_every_loss_with_one(name: str) -> None:
    loss = load_recipe(name, ()).loss

    assert (loss.kl, loss.attention, loss.vision, loss.focus_tokens) == (1, 1, 1, 16)
    assert loss.kl_direction == "reverse"


def test_a_recipe_says_the_same_after_a_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe("stage2", ("loss.layer_map={0: 1}", "max_steps=7"))
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.to_dict()))

    assert load_recipe(str(tmp_path / "r.yaml"), ()) == recipe


def test_what_may_change_on_resuming_are_fields_of_the_recipe() -> None:
    assert set(Recipe.__dataclass_fields__) > MAY_CHANGE


def test_set_changes_one_value() -> None:
    recipe = load_recipe(
        "stage2", ("optim.lr=1e-4", "loss.kl=0", "seed=5", "max_steps=null", "max_steps=3")
    )

    assert (recipe.optim.lr, recipe.loss.kl, recipe.seed, recipe.max_steps) == (1e-4, 0, 5, 3)
    assert recipe.optim.warmup == 0.03


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr", "expected key=value"),
        ("=3", "unknown key ''"),
        ("optm.lr=1", "unknown key 'optm'; nearest known: 'optim'"),
        ("optim.lrr=1", "unknown key 'lrr'; nearest known: 'lr'"),
        ("micro_bach=1", "nearest known: 'micro_batch'"),
        ("seed.x=1", "seed"),
        ("optim=3", "expected a mapping"),
        ("template.x=1", "template is not a group of keys"),
        ("seed=[1", "value is not YAML"),
        ("seed=-1", "seed must be at least 0, found -1"),
        ("seed=1.5", "expected int, found 1.5"),
        ("template=v2", "'v2' is not one of plain, v1"),
        ("precision=int8", "'int8' is not one of float32"),
        ("optim.lr=fast", "expected float, found 'fast'"),
        ("optim.lr=0", "lr must be > 0 and finite, found 0.0"),
        ("optim.lr=.nan", "lr: expected float, found nan"),
        ("optim.projector_lr=-1", "projector_lr must be > 0 and finite, found -1.0"),
        ("optim.clip_norm=0", "clip_norm must be > 0"),
        ("optim.warmup=3", "warmup must be 0 to 1, found 3.0"),
        ("optim.weight_decay=-1", "weight_decay must be >= 0"),
        ("loss.kl=-1", "kl must be >= 0 and finite, found -1.0"),
        ("loss.focus_tokens=145", "focus_tokens must be 0 to 144, found 145"),
        ("loss.kl_direction=sideways", "'sideways' is not one of reverse, forward"),
        ("loss.layer_map={0: x}", "expected int, found 'x'"),
        ("epochs=0", "epochs must be at least 1, found 0"),
        ("max_steps=0", "max_steps must be at least 1, found 0"),
        ("eval_every=0", "eval_every must be at least 1, found 0"),
        ("micro_batch=3", "micro_batch 3 does not divide global_batch 128"),
        ("workers=-1", "workers must be at least 0, found -1"),
        ("loss={kl: 1, kl: 2}", "key 'kl' stands twice"),
        ("seed=18446744073709551616", "seed must be below 2**64"),
    ],
)
def test_a_setting_that_makes_no_sense_says_why(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_recipe("stage2", (setting,))

    assert message in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping of keys, found list"),
        ("a: [", "is not YAML"),
        ("template: v1\n", "missing key 'image_aspect'"),
    ],
)
def test_a_recipe_file_that_is_none_says_why(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError) as found:
        load_recipe(str(file), ())

    assert str(file) in str(found.value)
    assert message in str(found.value)


def test_an_unknown_recipe_names_those_that_ship() -> None:
    with pytest.raises(
        ConfigError, match=r"no such recipe file, nor a shipped one \(stage1, stage2\)"
    ):
        load_recipe("stage3", ())


def test_a_micro_batch_that_the_processes_cannot_share_says_which_would_do(
    tars: list[Path], tmp_path: Path
) -> None:
    from shared.errors import TrainingError
    from student_train.loop import num_steps
    from tests.student_train.support import recipe, training_set

    samples = training_set(tars, recipe(micro_batch=8), None)

    with pytest.raises(TrainingError, match=r"by 2 .*; --set micro_batch to a divisor of 4$"):
        num_steps(samples, world=2)
    with pytest.raises(TrainingError, match=r"by 3 .*; --set global_batch to a multiple of 3$"):
        num_steps(samples, world=3)


def test_steps_are_those_of_the_epochs_unless_limited(tars: list[Path]) -> None:
    from student_train.loop import num_steps
    from tests.student_train.support import recipe, training_set

    def steps(**changes: Any) -> int:
        return num_steps(training_set(tars, recipe(**changes), None), world=1)

    assert (steps(), steps(epochs=3), steps(epochs=3, max_steps=4)) == (3, 9, 4)
    assert steps(max_steps=100) == 3


def test_the_rate_has_its_hand_values() -> None:
    """1.5 steps of warm-up are two, as transformers counts; no step is without effect."""
    from student_train.loop import warmup_cosine

    share = warmup_cosine(0.3, 5)

    assert [share(step) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.25, 0])


def test_the_shape_of_the_schedule() -> None:
    from student_train.loop import warmup_cosine

    share = warmup_cosine(0.1, 100)
    shares = [share(step) for step in range(101)]

    assert shares[:11] == sorted(shares[:11])
    assert shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0, abs=1e-12)
    assert shares[0] > 0
    assert warmup_cosine(0.0, 1)(0) == 1


def test_a_recipe_file_by_path_is_read(tmp_path: Path) -> None:
    assert load_recipe(str(write_recipe(tmp_path / "r.yaml", seed=9)), ()).seed == 9
