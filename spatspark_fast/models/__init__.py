"""Models: sparse encoders by timm name, SparK around them, forecasters, and what they cost."""
