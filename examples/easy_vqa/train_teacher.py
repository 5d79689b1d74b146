"""How the demo's teacher was made: `make demo-teacher`, about half an hour on two cores.

From random weights, with `train-student` alone. The log of the run that made the committed weights
is docs/teacher.log.
"""

import shutil
from pathlib import Path

import torch

from examples.easy_vqa.base_models import TEACHER, train_tokenizer, write_clip, write_llama
from examples.easy_vqa.prepare import read_questions
from examples.easy_vqa.steps import HERE, prepare_split, run
from examples.easy_vqa.steps import TEACHER as FOLDER
from shared.checkpoint import ModelFolder, write_weights

OUT = Path("teacher-run")


def main() -> None:
    """Train in teacher-run/, then put the weights, in float16, into examples/easy_vqa/teacher/."""
    train = prepare_split(OUT / "data", "train", None)
    held_out = prepare_split(OUT / "data", "val", None)
    llama, clip = OUT / "llama", OUT / "clip"
    write_clip(clip, seed=1)
    write_llama(llama, TEACHER, train_tokenizer(read_questions("train")), seed=2)
    first = ("--student", llama, "--vision-tower", clip, "--recipe", HERE / "teacher.yaml")
    # Shapes are learned late, and many small steps learn them sooner than few large ones.
    second = ("--student", OUT / "first/export", "--recipe", HERE / "teacher_second.yaml")
    for name, options in (("first", first), ("second", second)):
        print(run("train-student", "--data", train, "--eval-data", held_out, *options,
                  "--out", OUT / name))  # fmt: skip
    publish(OUT / "second" / "export", FOLDER)


def publish(export: Path, folder: Path) -> None:
    """The export with float16 weights; its tower's settings are inside it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns("*.safetensors", "dist*.json"))
    source = ModelFolder(str(export))
    tensors = source.read(source.tensor_files())
    write_weights(folder, {name: t.to(torch.float16) for name, t in tensors.items()}, "safetensors")


if __name__ == "__main__":
    main()
