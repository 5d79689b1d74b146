"""verify, repair, gc and diff: what is wrong is found and named, and nothing else is touched."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_builder import gc
from cache_builder.cli import cache_tools
from cache_builder.repair import missing_shards
from cache_builder.values import wrong_value
from shared.cache import Cache, open_cache
from shared.plan import plan_file
from tests.processes import start
from tests.support import (
    CLIP,
    FULL,
    TEACHER,
    build,
    edit_record,
    error_line,
    invoke,
    png,
    record,
    sample,
    stored_digests,
    teacher_copy,
    write_tar,
)

BAD = "ref-000001"


@pytest.fixture
def root(cache_path: Path, tmp_path: Path) -> Path:
    """A copy of the reference cache."""
    shutil.copytree(cache_path, tmp_path / "cache")
    return tmp_path / "cache"


def data(root: Path, shard: str = BAD) -> Path:
    return root / record(root, shard).data


def run(name: str, *arguments: object) -> tuple[int, str, str]:
    result = invoke(cache_tools, name, *map(str, arguments))
    return result.exit_code, result.stdout, result.stderr


def problems(root: Path, *options: str) -> list[dict[str, Any]]:
    code, stdout, _ = run("verify", root, "--json", *options)
    found: list[dict[str, Any]] = json.loads(stdout)["problems"]
    assert code == bool(found)
    return found


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


# Verify


def test_a_whole_cache_is_all_good_and_stays_as_it_is(root: Path) -> None:
    before = snapshot(root)

    code, stdout, _ = run("verify", root, "--decode", "--workers", 2)

    assert (code, stdout.splitlines()[-1].endswith(", 4 samples decoded: all good")) == (0, True)
    assert snapshot(root) == before


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_values_of_coarse_encodings_pass(
    packed_tars: list[Path], tmp_path: Path, bits: int
) -> None:
    spec = {
        **FULL,
        "attention": {"layers": [0], "encoding": f"sqrt{bits}"},
        "vision_tokens": {"encoding": f"channel{bits}"},
        "logprobs": {"top_k": 8, "encoding": "logprob8"},
    }
    build(tmp_path / "cache", packed_tars, spec)

    assert problems(tmp_path / "cache", "--decode") == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (
        lambda folder: flip(folder / "labels" / "c" / "0"), "labels/c/0", "has sha256",
    ),
    "flipped metadata": (
        lambda folder: flip(folder / "labels" / "zarr.json"), "labels/zarr.json", "has sha256",
    ),
    "the group's metadata": (
        lambda folder: flip(folder / "zarr.json"), "zarr.json", "has sha256",
    ),
    "a cut file": (
        lambda folder: os.truncate(folder / "labels" / "c" / "0", 9), "labels/c/0",
        "is 9 bytes, expected ",
    ),
    "a missing file": (
        lambda folder: (folder / "labels" / "c" / "0").unlink(), "labels/c/0",
        "is missing, expected ",
    ),
    "an extra file": (
        lambda folder: (folder / "labels" / "c" / "1").write_text("x"), "labels/c/1",
        "is a file that the record does not name",
    ),
    "a link": (
        lambda folder: replace_by_link(folder / "labels" / "c" / "0"), "labels/c/0",
        "is a link, expected a file",
    ),
    "a linked folder": (
        lambda folder: replace_by_link(folder / "labels"), "labels",
        "is a link that the record does not name",
    ),
    "a pipe": (
        lambda folder: replace_by_pipe(folder / "labels" / "c" / "0"), "labels/c/0",
        "is a special file, expected a file",
    ),
    "no folder": (shutil.rmtree, "labels/c/0", "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_shard_and_file(root: Path, damage: str) -> None:
    make, file, message = DAMAGE[damage]
    make(data(root))

    found = [problem for problem in problems(root) if problem["file"] == file]

    assert [(problem["kind"], problem["place"]) for problem in found] == [("shard", BAD)]
    assert message in found[0]["what"]
    code, stdout, stderr = run("verify", root)
    assert code == 1
    assert f"{BAD}: {file}: " in stdout
    assert stderr.splitlines()[-1] == (
        f"Error: {root}: 1 of 2 shards are damaged: {BAD}; cache-tools repair {root} takes out "
        "what is damaged and says what to build again"
    )


def test_a_linked_data_folder_is_found_and_not_read(root: Path) -> None:
    replace_by_link(data(root))

    (found,) = problems(root)

    assert (found["kind"], found["place"]) == ("shard", BAD)
    assert "is a symbolic link; a cache holds none" in found["what"]


@pytest.mark.parametrize("folder", ["records", "data", "plans"])
def test_a_linked_folder_of_the_cache_is_not_followed_but_named(root: Path, folder: str) -> None:
    before = set((root / "records").iterdir())
    replace_by_link(root / folder)

    if folder == "data":
        (found,) = problems(root, "--decode")
        assert (found["kind"], found["file"]) == ("cache", "data")
        assert "cp -rL" in found["what"]
        assert run("repair", root)[0] == 1
        assert set((root / "records").iterdir()) == before
    else:
        assert f"{folder}: is a symbolic link" in error_line(
            invoke(cache_tools, "verify", str(root))
        )


def test_a_link_to_the_cache_itself_is_the_users_and_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)

    assert run("verify", tmp_path / "link", "--decode")[0] == 0


def test_a_damaged_record_is_a_damaged_shard(root: Path) -> None:
    flip(root / "records" / f"{BAD}.json")

    (found,) = problems(root, "--decode")

    assert (found["kind"], found["place"]) == ("shard", BAD)
    assert "not a record of format 1 (has sha256" in found["what"]
    assert f"1 of 2 shards are damaged: {BAD}" in run("verify", root)[2]


def test_beside_a_damaged_record_what_cannot_be_checked_is_said(root: Path) -> None:
    flip(root / "records" / f"{BAD}.json")

    code, stdout, _ = run("verify", root, "--decode", "--teacher", TEACHER)

    assert code == 1
    assert "not a record of format 1" in stdout
    assert "samples and targets not checked: the cache cannot be opened as a whole" in stdout


def test_a_damaged_plan_is_found_and_repaired_without_losing_a_shard(root: Path) -> None:
    (plan,) = (root / "plans").iterdir()
    flip(plan)

    (found,) = problems(root)

    assert (found["kind"], found["place"]) == ("plan", f"plans/{plan.name}")
    assert run("repair", root)[0] == 0
    assert problems(root) == []
    assert len(open_cache(root)) == 4


def test_shards_of_two_builds_are_named_and_left_by_repair(root: Path) -> None:
    edit_record(root, BAD, lambda values: values["identity"]["teacher"].update(hidden_size=5))
    before = snapshot(root)

    (found,) = problems(root, "--decode")

    assert found["kind"] == "cache"
    assert "identity: teacher.hidden_size is 5, in shard ref-000000 64" in found["what"]
    code, _, stderr = run("repair", root)
    assert code == 1
    assert "1 problems that taking shards out does not solve" in stderr
    assert snapshot(root) == before


def test_all_shards_that_do_not_belong_are_named(root: Path) -> None:
    edit_record(root, BAD, lambda values: values["identity"]["numerics"].update(dtype="float64"))
    edit_record(root, BAD, lambda values: values["identity"]["teacher"].update(hidden_size=5))

    code, stdout, stderr = run("repair", root)

    assert (code, stdout.count("identity: ")) == (1, 2)
    assert "2 problems that taking shards out does not solve, the first: " in stderr
    assert "cache-tools repair" not in run("verify", root)[2]
    assert "of another build 1 shards: cache-tools verify" in run("info", root)[1]


@pytest.mark.parametrize("folder", ["", "records", "plans", "data"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc"), os.mkfifo])
def test_links_and_pipes_beside_what_is_read_are_found_and_left(
    root: Path, folder: str, make: Callable[[Path], object]
) -> None:
    make(root / folder / "odd")
    (root / folder / "file").touch()
    before = snapshot(root)

    (found,) = problems(root)

    assert (found["kind"], found["file"]) == ("stray", str(Path(folder) / "odd"))
    assert "a cache is made of folders and files alone" in found["what"]
    assert run("repair", root)[0] == 1
    assert snapshot(root) == before


def test_beside_a_link_samples_are_still_looked_at(root: Path) -> None:
    (root / "README").symlink_to("/etc/hostname")
    edit_record(root, BAD, lambda values: values["lengths"].__setitem__(0, 1))

    kinds = {problem["kind"] for problem in problems(root, "--decode")}

    assert kinds == {"shard", "stray"}
    assert "1 shards taken out" in run("repair", root, "--decode")[1]


def test_null_and_nothing_in_an_identity_differ(root: Path, cache_path: Path) -> None:
    edit_record(root, BAD, lambda values: values["identity"]["teacher"].update(extra=None))

    assert [problem["kind"] for problem in problems(root)] == ["cache"]
    assert run("diff", root, cache_path)[0] == 1


def test_what_is_no_plan_by_its_name_is_passed_over(root: Path) -> None:
    (root / "plans" / "my notes.json").write_text("not a plan")

    assert problems(root) == []
    assert run("info", root)[0] == 0


def test_a_record_of_another_format_is_never_removed(root: Path) -> None:
    edit_record(root, BAD, lambda values: values.update(format=2))
    before = snapshot(root)

    assert [problem["kind"] for problem in problems(root)] == ["cache"]
    assert run("repair", root)[0] == 1
    assert "format 2 there, 1 here" in run("gc", root, "--older-than", 0)[2]
    assert snapshot(root) == before


def test_one_key_in_two_shards_is_found(root: Path) -> None:
    edit_record(root, BAD, lambda values: values.update(keys=["s0", "text0"], probe=[]))

    (found,) = problems(root)

    assert "1 samples stand in shard ref-000000 too: 's0'" in found["what"]


def test_what_is_planned_and_what_is_left_over_is_said_but_no_problem(root: Path) -> None:
    file, content = plan_file(["ref-000000", "ref-000007"])
    (root / file).write_bytes(content)
    (root / "data" / "ref-000007-01234567").mkdir()

    code, stdout, _ = run("verify", root)

    assert code == 0
    assert "1 planned shards are not built yet" in stdout
    assert "1 leftovers that no record names" in stdout


@pytest.mark.parametrize("command", ["verify", "repair", "gc", "info"])
def test_a_folder_without_a_cache_is_one_line(tmp_path: Path, command: str) -> None:
    assert "no cache here" in error_line(invoke(cache_tools, command, str(tmp_path)))
    assert "no cache here" in error_line(invoke(cache_tools, command, str(tmp_path / "none")))


def test_looking_after_a_cache_needs_no_torch(root: Path) -> None:
    for arguments in (["verify", "--decode"], ["repair"], ["gc"], ["diff", str(root)]):
        program = (
            "import sys; from cache_builder.cli import cache_tools\n"
            f"try: cache_tools({[*arguments, str(root)]!r})\n"
            "except SystemExit as end: assert not end.code\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Values


def changed(name: str, edit: Callable[[Any], object]) -> Callable[[Any], Any]:
    def change(sample: Any) -> Any:
        values = getattr(sample, name)
        values = {0: values[0].copy()} if name == "attention" else values.copy()
        edit(values[0] if name == "attention" else values)
        return dataclasses.replace(sample, **{name: values})

    return change


def put(index: Any, value: float) -> Callable[[Any], object]:
    def edit(values: Any) -> None:
        values[index] = value

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("attention", put((0, 0, 0), np.nan)), "attention of layer 0 hold NaN"),
        (changed("attention", put((0, 0, 0), -0.1)), "attention of layer 0 from -0.1"),
        (changed("attention", put((0, 0), 0.5)), "sum of a row in attention of layer 0"),
        (changed("vision_tokens", put((3, 3), np.inf)), "vision tokens hold NaN or infinity"),
        (changed("top_logprobs", put((0, 0), 0.5)), "log-probabilities from"),
        (changed("top_logprobs", put(0, -0.1)), "sum of a response's probabilities"),
    ],
)
def test_a_value_that_cannot_be_is_said(cache: Cache, change: Any, message: str) -> None:
    sample = cache.read("s0")
    assert wrong_value(sample) is None

    found = wrong_value(change(sample))

    assert found is not None
    assert re.search(message, found), found


def test_decode_finds_what_digests_cannot(root: Path) -> None:
    edit_record(root, BAD, lambda values: values.update(lengths=[9, 9]))
    assert problems(root) == []

    found = problems(root, "--decode")

    assert {problem["place"] for problem in found} == {BAD}
    assert "rows of a sample that has 9 tokens" in found[0]["what"]


# Repair


@pytest.mark.parametrize("damage", [*DAMAGE, "a flipped record"])
def test_repair_takes_just_the_damaged_shard_out_and_names_its_tar(root: Path, damage: str) -> None:
    whole = snapshot(data(root, "ref-000000"))
    if damage == "a flipped record":
        flip(root / "records" / f"{BAD}.json")
    else:
        DAMAGE[damage][0](data(root))

    code, stdout, _ = run("repair", root)

    assert code == 0
    assert stdout.splitlines()[-1] == f"{root}: 1 shards taken out; build again: {BAD}.tar"
    assert open_cache(root).keys() == ["s0", "s1"]
    assert problems(root, "--decode") == []
    assert snapshot(data(root, "ref-000000")) == whole
    assert "1 of 2 planned (1 to build)" in run("info", root)[1]


def test_repair_of_a_whole_cache_does_nothing(root: Path) -> None:
    before = snapshot(root)

    assert run("repair", root)[1].splitlines() == [f"{root}: 0 shards taken out"]
    assert snapshot(root) == before


@pytest.mark.parametrize("where", ["data", "record", "file"])
def test_repair_removes_links_but_never_what_they_point_to(
    root: Path, tmp_path: Path, where: str
) -> None:
    victim = tmp_path / "victim"
    shutil.copytree(root, victim)
    before = snapshot(victim)
    place, target = {
        "data": (data(root), victim / record(victim, BAD).data),
        "record": (root / "records" / f"{BAD}.json", victim / "records" / f"{BAD}.json"),
        "file": (data(root) / "labels", victim / record(victim, BAD).data / "labels"),
    }[where]
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(target)

    assert run("repair", root)[0] == 0

    assert snapshot(victim) == before
    assert open_cache(root).keys() == ["s0", "s1"]
    assert not place.is_symlink()


def test_repair_rebuilds_when_it_is_given_the_teacher(root: Path, packed_tars: list[Path]) -> None:
    before = stored_digests(root)
    flip(data(root) / "labels" / "c" / "0")
    pattern = packed_tars[0].parent / "*.tar"

    code, stdout, _ = run(
        "repair", root, "--teacher", TEACHER, "--vision-tower", CLIP, "--data", pattern,
        "--device", "cpu",
    )  # fmt: skip

    assert code == 0
    assert "1 shards built, 2 samples stored, 0 skipped" in stdout
    assert stored_digests(root) == before
    assert problems(root, "--decode") == []


def test_repair_with_another_teacher_is_refused_before_anything_is_touched(
    root: Path, packed_tars: list[Path], tmp_path: Path
) -> None:
    other = teacher_copy(
        tmp_path / "teacher", edit=lambda tensors: tensors["model.norm.weight"].add_(1)
    )
    flip(data(root) / "labels" / "c" / "0")
    before = snapshot(root)

    result = invoke(
        cache_tools, "repair", *map(str, (root, "--teacher", other, "--vision-tower", CLIP)),
        *map(str, ("--data", packed_tars[1], "--device", "cpu")),
    )  # fmt: skip

    line = error_line(result)
    assert "teacher.weights_sha256: '" in line
    assert "Nothing was taken out" in line
    assert snapshot(root) == before


def test_repair_without_the_tar_says_so_before_taking_the_shard_out(
    root: Path, packed_tars: list[Path]
) -> None:
    flip(data(root) / "labels" / "c" / "0")
    before = sorted(root.rglob("*"))

    code, _, stderr = rebuild(root, packed_tars[0])

    assert code == 1
    assert f"1 tars to rebuild are not in --data: {BAD}.tar. Nothing was taken out" in stderr
    assert sorted(root.rglob("*")) == before
    assert run("repair", root, "--teacher", TEACHER)[0] == 2


def rebuild(root: Path, *tars: Path) -> tuple[int, str, str]:
    return run(
        "repair", root, "--teacher", TEACHER, "--vision-tower", CLIP, "--device", "cpu",
        *(option for tar in tars for option in ("--data", tar)),
    )  # fmt: skip


def test_repair_from_another_tar_of_that_name_is_refused_before_anything_is_touched(
    root: Path, tmp_path: Path
) -> None:
    other = write_tar(tmp_path / "other" / f"{BAD}.tar", sample("s2", image=png(7)))
    flip(data(root) / "labels" / "c" / "0")
    before, recorded = snapshot(root), record(root, BAD).tar

    code, _, stderr = rebuild(root, other)

    assert code == 1
    assert f"shard {BAD}: tar does not fit: " in stderr
    assert f"sha256: '{recorded.sha256}' there, '" in stderr
    assert "Nothing was taken out: name the tar that the shard was built from" in stderr
    assert snapshot(root) == before


def test_repair_from_a_broken_tar_is_refused_before_anything_is_touched(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / f"{BAD}.tar").write_bytes(b"no tar")
    flip(data(root) / "labels" / "c" / "0")
    before = snapshot(root)

    code, _, stderr = rebuild(root, tmp_path / f"{BAD}.tar")

    assert code == 1
    assert "1 of 1 tars cannot be read" in stderr
    assert "Nothing was taken out" in stderr
    assert snapshot(root) == before


def test_repair_does_not_take_out_what_it_could_not_build_beside_a_foreign_record(
    root: Path, packed_tars: list[Path]
) -> None:
    edit_record(root, "ref-000000", lambda values: values.update(format=2))
    flip(data(root) / "labels" / "c" / "0")
    before = snapshot(root)

    code, _, stderr = rebuild(root, *packed_tars)

    assert code == 1
    assert "the record of shard ref-000000 cannot be read or is of another version" in stderr
    assert "Nothing was taken out" in stderr
    assert snapshot(root) == before


def test_repair_says_which_planned_shards_are_missing(root: Path) -> None:
    file, content = plan_file([f"ref-{n:06d}" for n in range(6)])
    (root / file).write_bytes(content)
    flip(data(root) / "labels" / "c" / "0")
    missing = "planned shards have no record; build-cache builds them from their tars: "

    code, stdout, _ = run("repair", root)

    assert code == 0
    assert stdout.splitlines()[-2:] == [
        f"{root}: 1 shards taken out; build again: {BAD}.tar",
        f"{root}: 4 {missing}ref-000002.tar, ref-000003.tar, ref-000004.tar, ...",
    ]
    assert run("repair", root)[1].splitlines() == [
        f"{root}: 0 shards taken out",
        f"{root}: 5 {missing}ref-000001.tar, ref-000002.tar, ref-000003.tar, ...",
    ]


def test_repair_with_the_teacher_builds_what_an_earlier_repair_took_out(
    root: Path, packed_tars: list[Path]
) -> None:
    before = stored_digests(root)
    flip(data(root) / "labels" / "c" / "0")
    run("repair", root)

    without = rebuild(root, packed_tars[0])
    code, stdout, _ = rebuild(root, *packed_tars)

    assert without[0] == 0
    assert (
        f"1 planned shards have no record; build-cache builds them from their tars: {BAD}.tar"
        in (without[1])
    )
    assert code == 0
    assert stdout.splitlines() == [
        f"{root}: 0 shards taken out",
        f"{root}: 1 shards built, 2 samples stored, 0 skipped",
    ]
    assert stored_digests(root) == before
    assert problems(root, "--decode") == []


# What cannot be read


def as_nobody(root: Path, arguments: list[str]) -> None:
    """A command on the folder that this process is in: root reads whatever its mode says."""
    os.chdir(root)
    if os.geteuid() == 0:
        os.seteuid(65534)
    cache_tools(arguments)


def run_as_nobody(root: Path, name: str, *options: str) -> tuple[int | None, str]:
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, 65534, -1)
    log = root.with_name("log")
    process = start(as_nobody, root, [name, ".", *options], log=log)
    process.join()
    output = log.read_text()
    assert "Traceback" not in output
    return process.exitcode, output


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "a file": lambda root: data(root) / "labels" / "c" / "0",
    "a folder": lambda root: data(root) / "labels",
    "the data": data,
    "the record": lambda root: root / "records" / f"{BAD}.json",
    "a plan": lambda root: next((root / "plans").iterdir()),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_said_to_be_so_and_left_by_repair(root: Path, what: str) -> None:
    place = UNREADABLE[what](root)
    name = f"plans/{place.name}" if what == "a plan" else BAD
    before = snapshot(root)
    mode = place.stat().st_mode
    place.chmod(0)

    code, stdout = run_as_nobody(root, "verify", "--decode")
    repaired, output = run_as_nobody(root, "repair")

    assert (code, repaired) == (1, 1)
    assert "cannot be read (Permission denied)" in stdout
    assert f"1 shards or plans cannot be read: {name}; mend permissions or the disk" in stdout
    assert "damaged" not in stdout
    assert "0 shards taken out" in output
    assert (
        f"1 shards or plans cannot be read: {name}, and are left as they are: mend permissions or "
        "the disk and run the same command again" in output
    )
    place.chmod(mode)
    assert snapshot(root) == before
    assert run("verify", root, "--decode")[0] == 0


def test_repair_takes_damaged_shards_out_beside_one_that_cannot_be_read(root: Path) -> None:
    (data(root, "ref-000000") / "labels" / "c" / "0").chmod(0)
    flip(data(root) / "labels" / "c" / "0")

    code, output = run_as_nobody(root, "repair")

    assert code == 1
    assert f".: 1 shards taken out; build again: {BAD}.tar" in output
    assert "cannot be read: ref-000000, and are left as they are" in output
    assert [path.stem for path in (root / "records").iterdir()] == ["ref-000000"]


def test_a_damaged_shard_of_which_a_part_cannot_be_read_is_left(root: Path) -> None:
    flip(data(root) / "labels" / "c" / "0")
    (data(root) / "input_ids" / "c" / "0").chmod(0)

    code, output = run_as_nobody(root, "repair")

    assert code == 1
    assert f"{BAD}: labels/c/0: has sha256" in output
    assert "0 shards taken out" in output
    assert len(list((root / "records").iterdir())) == 2


# Sweeping


def leftovers(root: Path) -> list[Path]:
    """A half-written shard and half-written files, as killed builds leave them."""
    folder = root / "data" / "ref-000002-01234567"
    shutil.copytree(data(root), folder)
    files = [
        root / "records" / "ref-000002.json.89abcdef.partial",
        root / "plans" / "0123456789abcdef.json.89abcdef.partial",
    ]
    for file in files:
        file.write_text("{half")
    return [folder, *files]


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for inner in (path, *path.rglob("*")):
        os.utime(inner, (then, then))


def test_old_leftovers_are_swept_and_young_ones_spared(root: Path) -> None:
    folder, *files = leftovers(root)
    age(folder, 25)
    age(files[0], 25)
    before = snapshot(root)

    dry = run("gc", root, "--dry-run")
    assert dry[0] == 0
    assert f"{root}: would delete 2 leftovers" in dry[1]
    assert snapshot(root) == before
    code, stdout, _ = run("gc", root)

    assert code == 0
    assert "deleted data/ref-000002-01234567" in stdout
    assert "1 spared: younger than 24 hours" in stdout
    assert (folder.exists(), files[0].exists(), files[1].exists()) == (False, False, True)
    assert problems(root, "--decode") == []


def test_a_folder_in_which_one_file_is_young_is_spared(root: Path) -> None:
    folder, *_ = leftovers(root)
    age(folder, 25)
    os.utime(folder / "labels" / "c" / "0")

    run("gc", root)

    assert folder.exists()


def test_gc_touches_neither_links_nor_what_no_build_makes(root: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim-01234567"
    shutil.copytree(root, victim)
    (root / "data" / "ref-000003-01234567").symlink_to(victim)
    (root / "records" / "x.partial").symlink_to(victim / "records" / f"{BAD}.json")
    folder = root / "data" / "ref-000004-01234567"
    folder.mkdir()
    (folder / "inside").symlink_to(victim)
    (root / "data" / "notes").mkdir()
    (root / "README").write_text("mine")
    before = snapshot(victim)

    code, stdout, _ = run("gc", root, "--older-than", 0)

    assert (code, stdout.count("deleted data/")) == (0, 1)
    assert snapshot(victim) == before
    assert not folder.exists()
    assert (root / "data" / "ref-000003-01234567").is_symlink()
    assert (root / "data" / "notes").is_dir()
    assert (root / "README").exists()


def test_gc_stops_at_a_damaged_record_whose_folder_is_not_known(root: Path) -> None:
    flip(root / "records" / f"{BAD}.json")
    before = snapshot(root)

    assert "cache-tools repair" in error_line(
        invoke(cache_tools, "gc", str(root), "--older-than", "0")
    )
    assert snapshot(root) == before


def test_after_a_damaged_record_is_repaired_gc_takes_its_data(root: Path) -> None:
    folder = data(root)
    flip(root / "records" / f"{BAD}.json")
    run("repair", root)
    assert folder.exists()

    run("gc", root, "--older-than", 0)

    assert not folder.exists()


# Diff


def diff(a: Path, b: Path) -> dict[str, Any]:
    code, stdout, _ = run("diff", a, b, "--json")
    found: dict[str, Any] = json.loads(stdout)
    differs = any(found[field] for field in found if field != "equal")
    assert code == differs
    return found


def test_a_cache_and_its_copy_do_not_differ(root: Path, cache_path: Path) -> None:
    assert diff(root, cache_path)["equal"] == 2
    assert run("diff", root, cache_path)[1] == "2 shards are equal, 0 differ\n"


def test_two_builds_of_one_thing_do_not_differ(
    root: Path, packed_tars: list[Path], tmp_path: Path
) -> None:
    build(tmp_path / "again", packed_tars, FULL)

    assert run("diff", root, tmp_path / "again")[0] == 0


def test_caches_of_two_specs_differ_in_identity_with_both_values_and_in_arrays(
    root: Path, packed_tars: list[Path], tmp_path: Path
) -> None:
    half = {**FULL, "vision_tokens": {"encoding": "float16"}}
    build(tmp_path / "other", packed_tars[:1], half)

    found = diff(root, tmp_path / "other")

    assert found["identity"] == {"spec.vision_tokens.encoding": ["float32", "float16"]}
    assert found["shards_only_in_a"] == [BAD]
    assert list(found["shards"]) == ["ref-000000"]
    assert list(found["shards"]["ref-000000"]["arrays"]) == ["vision_tokens"]
    text = run("diff", root, tmp_path / "other")[1]
    assert 'identity  spec.vision_tokens.encoding: "float32" in A, "float16" in B' in text
    assert f"shard     {BAD}: only in A" in text
    assert "shard     ref-000000: vision_tokens: " in text


def test_shards_differ_in_tar_samples_and_skips(root: Path, cache_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["keys"][0] = "other"
        values["probe"] = []
        values["tar"]["size"] = 7
        values["skipped"].append({"key": "s2", "reason": "why not"})

    edit_record(root, BAD, edit)

    found = diff(cache_path, root)["shards"][BAD]

    assert found["keys_only_in_a"] == ["s2"]
    assert found["keys_only_in_b"] == ["other"]
    assert found["tar"]["size"][1] == 7
    assert found["skipped"] == {"s2": [None, "why not"]}
    assert found["arrays"] == {}
    assert found["probe"] == {
        p.key: [p.pixels_sha256 or "text only", None] for p in record(cache_path, BAD).probe
    }


def test_an_identity_that_differs_in_a_later_shard_differs(root: Path, cache_path: Path) -> None:
    edit_record(root, BAD, lambda values: values["identity"]["numerics"].update(dtype="float64"))

    found = diff(cache_path, root)

    assert (found["identity"], found["equal"]) == ({}, 1)
    assert found["shards"][BAD]["identity"] == {"numerics.dtype": ["float32", "float64"]}
    text = run("diff", cache_path, root)[1]
    assert f'{BAD}: identity  numerics.dtype: "float32" in A, "float64" in B' in text


def test_samples_that_lie_elsewhere_or_have_another_length_differ(
    root: Path, cache_path: Path
) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["keys"].reverse()
        values["lengths"].reverse()
        values["images"].reverse()

    edit_record(root, BAD, edit)
    edit_record(root, "ref-000000", lambda values: values["lengths"].__setitem__(0, 7))
    length, image = (getattr(record(cache_path, BAD), name)[0] for name in ("lengths", "images"))

    found = diff(cache_path, root)["shards"]

    assert list(found[BAD]["samples"]) == list(record(cache_path, BAD).keys)
    assert found[BAD]["samples"]["s2"] == [
        {"length": length, "row": 0, "image": image}, {"length": length, "row": 1, "image": image},
    ]  # fmt: skip
    assert [place["length"] for place in found["ref-000000"]["samples"]["s0"]][1] == 7
    assert "2 samples have another row, image or length: s2" in run("diff", cache_path, root)[1]


def test_of_shards_with_other_samples_the_length_of_common_ones_is_compared(
    root: Path, cache_path: Path
) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["keys"][0] = "other"
        values["lengths"][1] = 7
        values["probe"] = []

    edit_record(root, BAD, edit)

    ((ours, theirs),) = diff(cache_path, root)["shards"][BAD]["samples"].values()

    assert (ours["row"], theirs) == (None, {"length": 7, "row": None, "image": None})


def test_arrays_of_equal_sizes_and_other_bytes_differ(root: Path, cache_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["files"]["labels/c/0"]["sha256"] = "0" * 64

    edit_record(root, BAD, edit)

    assert set(diff(cache_path, root)["shards"][BAD]["arrays"]) == {"labels"}


def test_gc_leaves_a_folder_whose_name_only_begins_like_a_shards(root: Path) -> None:
    mine = root / "data" / "ref-000001-01234567.kept"
    mine.mkdir()

    run("gc", root, "--older-than", 0)

    assert mine.is_dir()


def test_gc_spares_a_shard_whose_record_comes_while_it_looks(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "records" / f"{BAD}.json"
    content = path.read_bytes()
    path.unlink()
    listed = gc.list_inside

    def committed_meanwhile(root: Path, folder: str) -> Any:
        found = list(listed(root, folder))
        if folder == "data":
            path.write_bytes(content)
        return found

    monkeypatch.setattr(gc, "list_inside", committed_meanwhile)

    run("gc", root, "--older-than", 0)

    assert data(root).is_dir()


@pytest.mark.parametrize(
    ("rest", "message"),
    [(0.0, "sum of a response's probabilities"), (-np.inf, "rest .* hold NaN or infinity")],
)
def test_a_rest_that_cannot_be_is_said(cache: Cache, rest: float, message: str) -> None:
    sample = cache.read("s0")
    assert sample.top_logprobs is not None
    values = np.full(len(sample.top_logprobs), rest, dtype=np.float32)

    found = wrong_value(dataclasses.replace(sample, rest_logprobs=values))

    assert found is not None
    assert re.search(message, found), found


def test_shards_of_every_plan_are_missed(root: Path) -> None:
    for name in ("ref-000007", "ref-000008"):
        file, content = plan_file([name])
        (root / file).write_bytes(content)

    assert missing_shards(root) == ["ref-000007", "ref-000008"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("verify", ("--device", "cpu"), "--device needs --teacher"),
        ("repair", ("--vision-tower", "x"), "--vision-tower needs --teacher"),
        ("fidelity", ("--teacher", "x", "--data", "x", "--set", "seed=1"), "--set needs --student"),
        ("gc", ("--older-than", "nan"), "--older-than nan: expected hours"),
    ],
)
def test_an_option_without_effect_is_refused(
    root: Path, name: str, options: tuple[str, ...], says: str
) -> None:
    code, _, stderr = run(name, root, *options)

    assert (code, says in stderr) == (2, True), stderr
