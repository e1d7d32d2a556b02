"""Named shapes and edge cases of Linear."""

from nacre.core.spec import Case, Normal

CASES = (
    Case("rows", {"in_features": 5, "out_features": 3}, (Normal((4, 5)),)),
    Case("one row", {"in_features": 5, "out_features": 3}, (Normal((5,)),)),
    Case("two leading dimensions", {"in_features": 5, "out_features": 3}, (Normal((2, 3, 5)),)),
    Case("three leading dimensions", {"in_features": 3, "out_features": 2}, (Normal((2, 1, 3, 3)),)),
    Case("no bias", {"in_features": 5, "out_features": 3, "bias": False}, (Normal((4, 5)),)),
    Case("no bias, one row", {"in_features": 5, "out_features": 3, "bias": False}, (Normal((5,)),)),
    Case("no bias, leading dimensions", {"in_features": 3, "out_features": 4, "bias": False}, (Normal((2, 3, 3)),)),
    Case("one feature in", {"in_features": 1, "out_features": 7}, (Normal((3, 1)),)),
    Case("one feature out", {"in_features": 7, "out_features": 1}, (Normal((3, 7)),)),
    Case("one of each", {"in_features": 1, "out_features": 1}, (Normal((1, 1)),)),
    Case("odd sizes", {"in_features": 7, "out_features": 5}, (Normal((11, 7)),)),
    Case("transposed", {"in_features": 4, "out_features": 3}, (Normal((2, 5, 4), layout="transposed"),)),
    Case("strided", {"in_features": 5, "out_features": 3}, (Normal((4, 5), layout="strided"),)),
    Case("channels_last", {"in_features": 3, "out_features": 2}, (Normal((2, 2, 3, 3), layout="channels_last"),)),
    Case("no rows", {"in_features": 5, "out_features": 3}, (Normal((0, 5)),)),
    Case("no rows of rows", {"in_features": 5, "out_features": 3}, (Normal((2, 0, 5)),)),
    Case("no features in", {"in_features": 0, "out_features": 3}, (Normal((2, 0)),)),
    Case("no features out", {"in_features": 5, "out_features": 0}, (Normal((2, 5)),)),
    Case("no features in, no bias", {"in_features": 0, "out_features": 3, "bias": False}, (Normal((2, 2, 0)),)),
    Case("frozen input", {"in_features": 5, "out_features": 3}, (Normal((4, 5), gradient=False),)),
    Case("small", {"in_features": 64, "out_features": 64}, (Normal((64, 64)),), bench=True),
    Case("text up", {"in_features": 768, "out_features": 3072}, (Normal((8, 197, 768)),), bench=True),
    Case("text down", {"in_features": 3072, "out_features": 768}, (Normal((8, 197, 3072)),), bench=True),
    Case("image tokens up", {"in_features": 768, "out_features": 3072}, (Normal((32, 196, 768)),), bench=True),
    Case("digits", {"in_features": 784, "out_features": 300}, (Normal((64, 784)),), bench=True),
    Case("square", {"in_features": 1024, "out_features": 1024}, (Normal((512, 1024)),), bench=True),
    Case("one token", {"in_features": 1024, "out_features": 4096, "bias": False}, (Normal((1, 1024)),), bench=True),
    Case("classifier", {"in_features": 512, "out_features": 10}, (Normal((128, 512)),), bench=True),
)
