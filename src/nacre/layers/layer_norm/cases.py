"""Named shapes and edge cases of LayerNorm."""

from nacre.core.spec import Case, Normal

CASES = (
    Case("rows", {"normalized_shape": 7}, (Normal((3, 7)),)),
    Case("one row", {"normalized_shape": 5}, (Normal((5,)),)),
    Case("one feature", {"normalized_shape": 1}, (Normal((4, 1)),)),
    Case("two dimensions together", {"normalized_shape": (3, 5)}, (Normal((2, 4, 3, 5)),)),
    Case("no affine", {"normalized_shape": 6, "elementwise_affine": False}, (Normal((2, 3, 6)),)),
    Case("no bias", {"normalized_shape": 6, "bias": False}, (Normal((2, 3, 6)),)),
    Case("large eps", {"normalized_shape": 6, "eps": 0.5}, (Normal((4, 6)),)),
    Case("odd rows", {"normalized_shape": 17}, (Normal((13, 17)),)),
    Case("transposed", {"normalized_shape": 6}, (Normal((2, 5, 6), layout="transposed"),)),
    Case("strided", {"normalized_shape": 6}, (Normal((4, 6), layout="strided"),)),
    Case("no rows", {"normalized_shape": 6}, (Normal((0, 6)),)),
    Case("frozen input", {"normalized_shape": 6}, (Normal((4, 6), gradient=False),)),
    Case("small", {"normalized_shape": 64}, (Normal((64, 64)),), bench=True),
    Case("image tokens", {"normalized_shape": 768}, (Normal((32, 196, 768)),), bench=True),
    Case("text", {"normalized_shape": 1024}, (Normal((4, 1024, 1024)),), bench=True),
)
