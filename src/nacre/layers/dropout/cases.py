"""Named shapes and edge cases of Dropout."""

from nacre.core.spec import Case, Normal

CASES = (
    Case("all dropped", {"p": 1.0}, (Normal((3, 7)),)),
    Case("half dropped", {"p": 0.5}, (Normal((3, 7)),), random=True),
    Case("most dropped", {"p": 0.9}, (Normal((13,)),), random=True),
    Case("one number", {"p": 0.3}, (Normal(()),), random=True),
    Case("transposed", {"p": 0.3}, (Normal((2, 5, 3), layout="transposed"),), random=True),
    Case("channels_last", {"p": 0.3}, (Normal((2, 3, 2, 4), layout="channels_last"),), random=True),
    Case("frozen input", {"p": 0.3}, (Normal((4, 6), gradient=False),), random=True),
    Case("inplace", {"p": 0.3, "inplace": True}, (Normal((4, 6), gradient=False),), random=True),
    Case("all dropped, strided", {"p": 1.0}, (Normal((4, 6), layout="strided"),)),
    Case("all dropped, channels_last", {"p": 1.0}, (Normal((2, 3, 2, 4), layout="channels_last"),)),
    Case("none dropped", {"p": 0.0}, (Normal((3, 7)),)),
    Case("none dropped, transposed", {"p": 0.0}, (Normal((2, 5, 3), layout="transposed"),)),
    Case("evaluation", {"p": 0.5}, (Normal((3, 7)),), training=False),
    Case("evaluation, strided", {"p": 0.5}, (Normal((4, 6), layout="strided"),), training=False),
    Case("evaluation, inplace", {"p": 0.5, "inplace": True}, (Normal((3, 7)),), training=False),
    Case("evaluation, no elements", {"p": 0.5}, (Normal((0, 6)),), training=False),
    Case("small", {"p": 0.1}, (Normal((64, 64)),), random=True, bench=True),
    Case("text", {"p": 0.1}, (Normal((8, 197, 768)),), random=True, bench=True),
    Case("hidden", {"p": 0.5}, (Normal((8, 197, 3072)),), random=True, bench=True),
)
