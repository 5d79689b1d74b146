"""Imported once by the server that tests.processes forks from: all that a build imports."""

import torch
from transformers import LlamaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import cache_builder.build
import cache_builder.cli
import cache_builder.setup
import shared.cache

torch.set_num_threads(1)
LOADED = (LlamaTokenizer, CLIPImageProcessorPil, cache_builder, shared)
