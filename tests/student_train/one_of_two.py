"""One process of two: loss terms and gradients of its share of a global batch, written to files.

Started by torchrun in `test_batches.py`.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared.cache import open_cache
from student_train.loop import make_accelerator
from tests.student_train.support import aligned, batches_of, gradients_of, recipe, training_set


def main() -> None:
    """Compute and write."""
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    accelerator = make_accelerator(recipe(), cpu=True)
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"]) == 2
    rank = accelerator.process_index
    cache = open_cache(settings["cache"])
    for name, case in settings["cases"].items():
        changed = recipe(micro_batch=case["micro_batch"])
        samples = training_set([Path(tar) for tar in settings["tars"]], changed, cache)
        mine = list(batches_of(samples, case["order"][rank::2], changed.micro_batch))
        terms, gradients = gradients_of(aligned(changed, cache), mine, changed)
        out = Path(settings["out"]) / f"{name}-{rank}"
        out.with_suffix(".json").write_text(json.dumps(terms))
        save_file(gradients, out.with_suffix(".safetensors"))
    gc.collect()  # as in `run_training`
    accelerator.end_training()


main()
