"""Imported once by the server that tests.processes forks from: all that a build and a training
import.
"""

import torch
from transformers import LlamaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import cache_builder.build
import cache_builder.cli
import cache_builder.setup
import shared.cache
import student_train.cli
import student_train.setup
from tests.support import builder

torch.set_num_threads(1)
FEW_ARRAYS = {"template": "v1", "image_aspect": "pad", "vision_tokens": {"encoding": "float32"}}
BUILDER = builder(FEW_ARRAYS)
"For processes that are to be so many that loading a teacher in each would take too long."
LOADED = (LlamaTokenizer, CLIPImageProcessorPil, cache_builder, shared, student_train)
