"""The commands as people and machines meet them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cache_builder import estimate
from cache_builder.cli import build_cache, cache_tools
from shared.plan import read_plan
from shared.spec import CacheSpec
from tests.support import (
    ALIGN_ONLY,
    CLIP,
    FULL,
    REFERENCE,
    TEACHER,
    command,
    edit_record,
    error_line,
    invoke,
    png,
    sample,
    stored_digests,
    teacher_copy,
    text_sample,
    write_tar,
)

SHIPPED = Path(__file__).parents[2] / "cache_specs"
COMMANDS = [build_cache, cache_tools, *cache_tools.commands.values()]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "t.tar", sample("a"), text_sample("b"), sample("bad", image=b""))


@pytest.mark.parametrize("found", COMMANDS, ids=lambda found: found.name)
def test_every_command_and_option_says_what_it_is(found: click.Command) -> None:
    assert found.help
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("found", cache_tools.commands.values(), ids=lambda found: found.name)
def test_every_tool_is_in_the_readme(found: click.Command) -> None:
    assert f"cache-tools {found.name}" in (REFERENCE.parents[1] / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("build_cache", ["--help"]),
        ("cache_tools", ["--help"]),
        ("cache_tools", ["pack", "--help"]),
        ("cache_tools", ["info", "--help"]),
        ("cache_tools", ["verify", "--help"]),
        ("cache_tools", ["repair", "--help"]),
        ("cache_tools", ["gc", "--help"]),
        ("cache_tools", ["diff", "--help"]),
        ("cache_tools", ["fidelity", "--help"]),
    ],
)
def test_help_needs_neither_torch_nor_zarr(name: str, arguments: list[str]) -> None:
    program = (
        f"import sys; from cache_builder.cli import {name}\n"
        f"try: {name}({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(bool({'torch', 'zarr', 'numpy', 'transformers'} & set(sys.modules)))"
    )

    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_info_needs_no_torch(cache_path: Path) -> None:
    program = (
        "import sys; from cache_builder.cli import cache_tools\n"
        f"try: cache_tools(['info', {str(cache_path)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_unknown_option_is_a_usage_error() -> None:
    assert invoke(build_cache, "--boat").exit_code == 2


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("build-cache", []),
        ("cache-tools", ["fidelity", "cache", "--teacher", "x"]),
        ("cache-tools", ["fidelity", "--teacher", "x"]),  # the second tar is taken for the cache
        ("cache-tools", ["repair", "cache", "--teacher", "x"]),
    ],
)
def test_a_pattern_that_the_shell_expanded_is_said_to_lack_its_quotes(
    tmp_path: Path, name: str, given: list[str]
) -> None:
    tars = [str(write_tar(tmp_path / f"shard-00000{n}.tar")) for n in range(3)]
    cli = build_cache if name == "build-cache" else cache_tools

    result = invoke(cli, *given, "--data", *tars, "--device", "cpu")

    assert result.exit_code == 2
    assert "3 tars stand behind --data, which takes one pattern" in result.stderr
    assert result.stderr.endswith(f"as in --data '{tmp_path}/shard-*.tar'\n")


@pytest.mark.parametrize(
    ("tars", "pattern"),
    [
        (["shard-09.tar", "shard-10.tar"], "shard-*.tar"),
        (["t/a.tar", "t/b.tar"], "t/*.tar"),
        (["it's-1.tar", "it's-2.tar"], "'it'\"'\"'s-*.tar'"),
        (["a/x.tar", "b/x.tar"], "tars/*.tar"),
    ],
)
def test_the_pattern_that_was_meant_is_guessed_from_the_tars(tars: list[str], pattern: str) -> None:
    assert pattern in invoke(build_cache, "--data", *tars).stderr


@pytest.mark.parametrize("url", ["http://host/c", "s3://bucket/c"])
def test_a_url_is_no_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = ("--spec", "default", "--teacher", "x", "--data", "t.tar", "--out", url)
    for cli, *given in ((build_cache, *out), (cache_tools, "info", url)):
        result = invoke(cli, *given)

        assert result.exit_code == 2
        assert f"'{url}' is a URL: only file systems are read and written" in result.stderr
    data = ("--spec", "default", "--teacher", "x", "--data", f"{url}.tar", "--out", "c")
    assert f"{url}.tar is a URL" in error_line(invoke(build_cache, *data))
    assert not any(tmp_path.iterdir())


def test_a_spec_that_ships_goes_by_its_name_and_others_are_named(tmp_path: Path) -> None:
    assert CacheSpec.load("small") == CacheSpec.load(SHIPPED / "small.yaml")

    given = ("--spec", "smal", "--teacher", "x", "--data", "t.tar", "--out", str(tmp_path))
    assert "smal: no such spec file, nor a shipped one (align-kd, " in error_line(
        invoke(build_cache, *given)
    )


def test_an_argument_too_many_that_is_no_tar_is_named_as_before() -> None:
    result = invoke(cache_tools, "info", "cache", "boat.tar")

    assert result.exit_code == 2
    assert "unexpected extra argument (boat.tar)" in result.stderr


def test_a_missing_option_is_a_usage_error(tmp_path: Path) -> None:
    assert invoke(build_cache, "--out", str(tmp_path)).exit_code == 2


def test_results_go_to_stdout_as_json_and_progress_to_stderr(tmp_path: Path, tar: Path) -> None:
    result = command(tmp_path / "cache", tar, ALIGN_ONLY, TEACHER, "--json")

    expected = {"built": 1, "present": 0, "samples": 2, "skipped": 1, "left": 0}
    assert json.loads(result.stdout) == expected
    assert "sample/s" in result.stderr


def test_skips_are_warned_about_with_their_reason(
    tmp_path: Path, tar: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command(tmp_path / "cache", tar, ALIGN_ONLY)

    assert "shard=t skipped=bad reason=image of zero bytes" in caplog.text


# Dry run


def dry(tmp_path: Path, tar: Path, teacher: Path = TEACHER) -> dict[str, object]:
    result = command(tmp_path / "dry", tar, FULL, teacher, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "dry").exists()
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_a_dry_run_needs_no_weights_and_writes_nothing(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "pytorch_model.bin").unlink()

    found = dry(tmp_path, tar, teacher)

    assert (found["samples"], found["examined"]) == (3, 3)


def test_a_dry_run_predicts_the_sizes_that_a_build_stores(tmp_path: Path) -> None:
    samples = [sample(f"s{n}") for n in range(5)]
    unusable = sample("a", b"{", png(9, (40, 40)))
    tar = write_tar(tmp_path / "t.tar", unusable, *samples, text_sample("b"))
    signals = {s["signal"]: s for s in dry(tmp_path, tar)["signals"]}  # type: ignore[attr-defined]
    command(tmp_path / "cache", tar, FULL)

    import zarr

    (folder,) = (tmp_path / "cache" / "data").iterdir()
    group = zarr.open_group(str(folder), mode="r")

    def size(*names: str) -> int:
        return sum(group[name].nbytes for name in names)

    def predicted(signal: str) -> float:
        return float(signals[signal]["unit_bytes"] * signals[signal]["units"])

    assert predicted("sequence") == size("input_ids", "labels")
    assert predicted("attention") == size("attention_0")
    assert predicted("vision tokens") == size("vision_tokens")
    rest = 4 * group["top_ids"].shape[0]  # counted though k is the whole vocabulary
    assert predicted("log-probabilities") == size("top_ids", "top_logprobs") + rest
    assert predicted("image digests") == size("image_sha256")
    assert predicted("probe") == size("probe_annotation", "probe_image")
    whole = size(*group.array_keys())
    edges = size(*(name for name in group.array_keys() if name.endswith("_offsets")))
    assert sum(map(predicted, signals)) - rest == whole - edges
    assert edges < 0.001 * whole


def test_a_dry_run_scales_what_it_examined_to_all_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [sample(f"s{n}") for n in range(3)]
    whole = write_tar(
        tmp_path / "t.tar", same[0], sample("bad", b"{"), *same[1:], sample("b", b"{")
    )
    exact = dry(tmp_path, whole)
    monkeypatch.setattr(estimate, "_MOST_SAMPLES", 2)  # one of either kind

    found = dry(tmp_path, whole)

    assert (exact["examined"], exact["all_skipped"]) == (5, 2)
    assert (found["examined"], found["all_skipped"]) == (2, round(5 / 2))


def test_a_dry_run_of_a_part_finds_the_sizes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "t.tar", *(sample(f"s{n}") for n in range(4)))

    def units() -> dict[str, float]:
        signals = dry(tmp_path, tar)["signals"]
        return {s["signal"]: s["units"] for s in signals}  # type: ignore[attr-defined]

    exact = units()
    monkeypatch.setattr(estimate, "_MOST_SAMPLES", 2)
    found = units()

    for name in ("sequence", "attention", "log-probabilities"):
        assert found[name] == exact[name], name


def test_a_dry_run_of_more_tars_than_samples_examines_one_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_MOST_SAMPLES", 2)
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", sample(f"{name}0"), sample(f"{name}1"))

    found = dry(tmp_path, tmp_path / "[abc].tar")

    assert (found["samples"], found["examined"]) == (6, 3)
    assert found["size"]


def test_attention_of_two_layers_is_predicted_as_twice_that_of_one(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"))
    sizes = []
    for layers in ([0], [0, 1]):
        spec = {**FULL, "attention": {"layers": layers, "encoding": "float32"}}
        result = command(tmp_path / "dry", tar, spec, TEACHER, "--dry-run", "--json")
        (size,) = (
            s["unit_bytes"]
            for s in json.loads(result.stdout)["signals"]
            if s["signal"] == "attention"
        )
        sizes.append(size)

    assert sizes[1] == 2 * sizes[0]


def test_a_dry_run_counts_an_image_in_every_tar_that_shows_it(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", sample(f"{name}0"), sample(f"{name}1"))

    found = dry(tmp_path, tmp_path / "[ab].tar")

    units = {s["signal"]: s["units"] for s in found["signals"]}  # type: ignore[attr-defined]
    assert units["vision tokens"] == units["image digests"] == 2


def test_a_dry_run_leaves_out_what_is_built(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", sample(name))
    command(tmp_path / "cache", tmp_path / "a.tar", FULL)

    result = command(tmp_path / "cache", tmp_path / "[ab].tar", FULL, TEACHER, "--dry-run")

    assert f"1 of 2 tars have their shard in {tmp_path / 'cache'} already" in result.stdout
    assert "dry run: 1 samples in 1 tars" in result.stdout


def test_a_dry_run_refuses_tars_that_cannot_be_read(tmp_path: Path, tar: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:700])

    line = error_line(command(tmp_path / "cache", tmp_path / "*.tar", FULL, TEACHER, "--dry-run"))

    assert "1 of 2 tars cannot be read" in line
    assert "cut.tar" in line


def test_a_dry_run_names_what_would_be_skipped(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("good"), sample("bad", b"{"))

    result = command(tmp_path / "cache", tar, FULL, TEACHER, "--dry-run")

    assert "2 samples in 1 tars" in result.stdout
    assert "would skip bad: JSON cannot be parsed" in result.stdout


def test_a_dry_run_says_that_a_build_would_stop(tmp_path: Path) -> None:
    bad = [sample(f"bad{n}", b"{") for n in range(3)]
    tar = write_tar(tmp_path / "t.tar", sample("good"), *bad)

    plain, more = (
        command(tmp_path / "cache", tar, FULL, TEACHER, "--dry-run", *options)
        for options in (("--max-skipped", "1%"), ("--max-skipped", "3"))
    )

    line = "A build would stop: some 3 of 4 samples cannot be used, --max-skipped 1% allows 1"
    assert plain.stdout.splitlines()[-1] == line
    assert "would stop" not in more.stdout


def test_a_dry_run_counts_losses_that_headers_tell_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_MOST_SAMPLES", 2)
    for name in "ab":
        good = [sample(f"{name}{n}") for n in range(4)]
        write_tar(tmp_path / f"{name}.tar", sample(f"{name}-lost")[1:], *good)

    found = dry(tmp_path, tmp_path / "[ab].tar")

    assert (found["samples"], found["examined"], found["all_skipped"]) == (10, 4, 2)
    assert found["size"]


def test_a_dry_run_counts_what_earlier_builds_lost(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a0"), *(sample(f"a{n}", b"{") for n in (1, 2)))
    write_tar(tmp_path / "b.tar", sample("b0"), sample("b1", b"{"))
    command(tmp_path / "cache", tmp_path / "a.tar", FULL, TEACHER, "--max-skipped", "2")

    plain, more = (
        command(
            tmp_path / "cache", tmp_path / "[ab].tar", FULL, TEACHER,
            "--dry-run", "--max-skipped", limit,
        )
        for limit in ("50%", "2")
    )  # fmt: skip

    assert "would stop" not in plain.stdout
    assert "A build would stop: some 3 of 5 samples" in more.stdout


def test_a_dry_run_refuses_what_the_build_would_refuse(tmp_path: Path, tar: Path) -> None:
    deep = {**FULL, "attention": {"layers": [7], "encoding": "float32"}}

    line = error_line(command(tmp_path / "cache", tar, deep, TEACHER, "--dry-run"))

    assert "attention layer 7, but the teacher has layers 0 to 2" in line


def test_a_dry_run_in_a_folder_that_the_build_would_continue_finds_nothing_to_do(
    tmp_path: Path, tar: Path
) -> None:
    command(tmp_path / "cache", tar, FULL)
    options = ("--dry-run", "--dtype", "float32")

    for given in (options[:1], options):
        result = command(tmp_path / "cache", tar, FULL, TEACHER, *given)
        assert "1 of 1 tars have their shard" in result.stdout, result.output


@pytest.mark.parametrize(
    "what", ["spec", "config", "dtype", "tokenizer", "processor", "tar", "record"]
)
def test_a_dry_run_refuses_a_cache_that_the_build_would_not_continue(
    tmp_path: Path, tar: Path, what: str
) -> None:
    out, spec, teacher, tower, options = tmp_path / "cache", FULL, TEACHER, CLIP, ()
    command(out, tar, spec)
    if what == "spec":
        spec = ALIGN_ONLY
        named = "spec.logprobs: "
    elif what == "config":
        teacher = teacher_copy(tmp_path / "teacher", config={"rms_norm_eps": 0.5})
        named = "teacher.config_sha256: '"
    elif what == "dtype":
        options = ("--dtype", "float16")
        named = "numerics.dtype: 'float32' there, 'float16' here"
    elif what == "tokenizer":
        edit_record(out, "t", lambda values: values["identity"]["tokenizer"].update(bos=7))
        named = "tokenizer.bos: 7 there, 1 here"
    elif what == "processor":
        tower = tmp_path / "clip"
        shutil.copytree(CLIP, tower)
        path = tower / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.0, 0.0, 0.0]}))
        named = "image_processor.settings.image_mean: ["
    elif what == "tar":
        write_tar(tar, sample("a"), text_sample("other"))
        named = "shard t: tar does not fit: index_sha256: '"
    else:
        (out / "records" / "t.json").write_text("{")
        named = "not a record of format 1"

    given = ("--vision-tower", str(tower), *options)
    dry_line = error_line(command(out, tar, spec, teacher, "--dry-run", *given))
    line = error_line(command(out, tar, spec, teacher, *given))

    assert named in dry_line
    assert named in line
    assert dry_line.split(":")[:3] == line.split(":")[:3]


def test_a_dry_run_refuses_a_sample_that_another_tars_shard_holds(
    tmp_path: Path, tar: Path
) -> None:
    command(tmp_path / "cache", tar, FULL)
    more = write_tar(tmp_path / "u.tar", sample("a"))

    line = error_line(command(tmp_path / "cache", more, FULL, TEACHER, "--dry-run"))

    assert "sample 'a' stands in t.tar and in u.tar" in line


# Info


def test_info_says_what_a_cache_is(cache_path: Path) -> None:
    result = invoke(cache_tools, "info", str(cache_path))

    assert result.exit_code == 0
    for text in (
        "2 of 2 planned (complete)", "4, 0 skipped, 3 images", "template  v1, image pad",
        "attention", "vision tokens", "log-probabilities", "weights",
    ):  # fmt: skip
        assert text in result.stdout


def test_info_for_machines_counts_bytes_that_are_really_there(cache_path: Path) -> None:
    found = json.loads(invoke(cache_tools, "info", str(cache_path), "--json").stdout)

    files = [path for path in (cache_path / "data").rglob("*") if path.is_file()]
    assert sum(found["sizes"].values()) == sum(path.stat().st_size for path in files)
    assert (found["shards"], found["samples"], found["images"]) == (2, 4, 3)
    assert found["identity"]["spec"]["template"] == "v1"


def test_info_counts_skips_by_reason(tmp_path: Path, tar: Path) -> None:
    command(tmp_path / "cache", tar, ALIGN_ONLY)

    result = invoke(cache_tools, "info", str(tmp_path / "cache"))

    assert "skipped   1 x image of zero bytes" in result.stdout


@pytest.fixture
def skipping(tmp_path: Path) -> Path:
    """A cache of two tars with five samples skipped for two reasons."""
    broken = [sample(f"b{n}", image=b"") for n in range(4)]
    tars = [
        write_tar(tmp_path / "t-0.tar", sample("a"), *broken[:2]),
        write_tar(tmp_path / "t-1.tar", sample("c"), *broken[2:], sample("n", image=None)),
    ]
    command(tmp_path / "cache", tars, ALIGN_ONLY)
    return tmp_path / "cache"


def test_info_names_up_to_three_samples_for_each_reason_and_their_shards(skipping: Path) -> None:
    lines = invoke(cache_tools, "info", str(skipping)).stdout.splitlines()

    first = lines.index("skipped   4 x image of zero bytes")
    assert lines[first + 1] == "          b0 in t-0, b1 in t-0, b2 in t-1, ... (--json: all)"
    assert lines[first + 2].startswith("skipped   1 x ")
    assert lines[first + 3] == "          n in t-1"


def test_info_for_machines_lists_every_skipped_sample(skipping: Path) -> None:
    found = json.loads(invoke(cache_tools, "info", str(skipping), "--json").stdout)

    listed = found["skipped_samples"]
    assert sorted((s["key"], s["shard"]) for s in listed) == [
        ("b0", "t-0"), ("b1", "t-0"), ("b2", "t-1"), ("b3", "t-1"), ("n", "t-1"),
    ]  # fmt: skip
    assert {s["reason"] for s in listed if s["key"] != "n"} == {"image of zero bytes"}
    assert (found["skipped"], found["skip_reasons"]["image of zero bytes"]) == (5, 4)


def test_info_on_a_begun_build_lists_what_is_pending(tmp_path: Path, tar: Path) -> None:
    command(tmp_path / "cache", tar, ALIGN_ONLY)
    (tmp_path / "cache" / "records" / "t.json").unlink()

    result = invoke(cache_tools, "info", str(tmp_path / "cache"))

    assert "0 of 1 planned (1 to build)" in result.stdout
    assert "pending   t" in result.stdout


def test_a_plan_is_one_file_whatever_the_order_of_its_tars(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", text_sample(name)) for name in "ab"]

    for some in (tars, tars[::-1]):
        command(tmp_path / "cache", some, FULL)

    (file,) = (tmp_path / "cache" / "plans").iterdir()
    assert read_plan(tmp_path / "cache", f"plans/{file.name}") == ("a", "b")


def test_info_on_no_cache_is_one_line(tmp_path: Path) -> None:
    assert "no cache here" in error_line(invoke(cache_tools, "info", str(tmp_path)))


@pytest.mark.parametrize("plan", ["", "[]", "{}", '{"shards": 5}', '{"shards": [5]}'])
def test_info_on_a_damaged_plan_is_one_line(tmp_path: Path, tar: Path, plan: str) -> None:
    command(tmp_path / "cache", tar, ALIGN_ONLY)
    (tmp_path / "cache" / "plans" / f"{0:016x}.json").write_text(plan)

    assert "not a plan" in error_line(invoke(cache_tools, "info", str(tmp_path / "cache")))


@pytest.mark.parametrize("section", ["spec", "teacher", "tokenizer", "image_processor", "numerics"])
def test_info_on_a_record_without_part_of_its_identity_is_one_line(
    tmp_path: Path, tar: Path, section: str
) -> None:
    command(tmp_path / "cache", tar, ALIGN_ONLY)
    edit_record(tmp_path / "cache", "t", lambda values: values["identity"].pop(section))

    assert section in error_line(invoke(cache_tools, "info", str(tmp_path / "cache")))


# What does not change bytes


def test_a_brace_range_a_glob_and_single_paths_build_the_same(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"t-{n}.tar", sample(f"s{n}")) for n in range(3)]
    ways = {"brace": [f"{tmp_path}/t-{{0..2}}.tar"], "glob": [f"{tmp_path}/t-?.tar"], "each": tars}
    for name, data in ways.items():
        result = command(tmp_path / name, data, ALIGN_ONLY)
        assert "3 shards built" in result.stdout

    assert stored_digests(tmp_path / "brace") == stored_digests(tmp_path / "each")
    assert stored_digests(tmp_path / "glob") == stored_digests(tmp_path / "each")


def test_an_output_that_cannot_be_written_is_one_line(cache_path: Path) -> None:
    code = "from cache_builder.cli import cache_tools; cache_tools()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "info", str(cache_path)], stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode
    assert "Error: the output cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
