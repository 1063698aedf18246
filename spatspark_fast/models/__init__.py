"""Models: sparse encoders by timm name, SparK around them, and what they cost."""

from spatspark_fast.models.backbones import build_encoder, encoder_state_dict, load_encoder, save_encoder
from spatspark_fast.models.spark import SparK, SparKOutput, build_spark

__all__ = [
    "SparK",
    "SparKOutput",
    "build_encoder",
    "build_spark",
    "encoder_state_dict",
    "load_encoder",
    "save_encoder",
]
