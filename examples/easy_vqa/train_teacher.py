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
from shared.checkpoint import ModelFolder, copy_settings, write_weights

OUT = Path("teacher-run")


def main() -> None:
    """Train in teacher-run/, then put the weights, in float16, into examples/easy_vqa/teacher/."""
    train = prepare_split(OUT / "data", "train", None)
    held_out = prepare_split(OUT / "data", "val", None)
    llama, clip = OUT / "llama", OUT / "clip"
    write_clip(clip, seed=1)
    write_llama(llama, TEACHER, train_tokenizer(read_questions("train")), seed=2)
    print(
        run("train-student", "--data", train, "--student", llama, "--vision-tower", clip,
            "--recipe", HERE / "teacher.yaml", "--eval-data", held_out, "--out", OUT / "run")
    )  # fmt: skip
    publish(OUT / "run" / "export", clip, FOLDER)


def publish(export: Path, clip: Path, folder: Path) -> None:
    """The export with float16 weights and the tower's settings inside it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "clip").mkdir(parents=True)
    copy_settings(export, folder)
    config = (folder / "config.json").read_text().replace(f'"{clip}"', '"clip"')
    (folder / "config.json").write_text(config)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(clip / name, folder / "clip" / name)
    source = ModelFolder(str(export))
    tensors = source.read(source.tensor_files())
    write_weights(folder, {name: t.to(torch.float16) for name, t in tensors.items()}, "safetensors")


if __name__ == "__main__":
    main()
