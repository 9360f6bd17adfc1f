"""Names that users give: formats, cache types, instruction sets, devices. Nothing is imported for them."""

DTYPES = ("source", "bf16", "f16", "f8", "q8", "q4", "f32")  # what `pack` may store weights as
KV_TYPES = ("auto", "f16", "bf16", "f32", "q8")  # of a cache
ISAS = ("scalar", "avx2", "avx512", "avx512x", "amx")
DEVICES = ("cpu", "cuda", "auto", "sim")
TEMPLATE_PARAMETERS = ("messages", "vocabulary", "self", "max_chars")  # of encode: no option has these names
