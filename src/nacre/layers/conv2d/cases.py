"""Named shapes and edge cases of Conv2d."""

from typing import Any

from nacre.core.spec import Case, Normal


def _channels(in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], **options: Any) -> Any:
    return {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, **options}


CASES = (
    Case("3x3", _channels(2, 3, 3, padding=1), (Normal((2, 2, 3, 4)),)),
    Case("valid", _channels(2, 3, (2, 3), padding="valid"), (Normal((2, 2, 4, 3)),)),
    Case("one by one", _channels(3, 2, 1), (Normal((2, 3, 2, 3)),)),
    Case("one of everything", _channels(1, 1, 1), (Normal((1, 1, 1, 1)),)),
    Case("no bias", _channels(2, 2, 2, bias=False), (Normal((2, 2, 3, 3)),)),
    Case("one image without batch", _channels(2, 3, 3, padding=1), (Normal((2, 3, 4)),)),
    Case("no images", _channels(2, 3, 2), (Normal((0, 2, 3, 3)),)),
    Case("stride", _channels(2, 2, 3, stride=2, padding=1), (Normal((2, 2, 4, 3)),)),
    Case("stride with rows left over", _channels(1, 2, 2, stride=3), (Normal((2, 1, 4, 6)),)),
    Case("stride beyond the kernel", _channels(2, 2, 1, stride=(3, 2)), (Normal((2, 2, 5, 3)),)),
    Case("different strides", _channels(1, 2, (3, 2), stride=(1, 2), padding=(2, 1)), (Normal((2, 1, 3, 5)),)),
    Case("dilation", _channels(1, 2, (2, 3), dilation=(3, 2), padding=(1, 2)), (Normal((2, 1, 4, 5)),)),
    Case("stride and dilation", _channels(1, 2, 2, stride=2, dilation=3, padding=1), (Normal((2, 1, 5, 4)),)),
    Case("padding beyond the kernel", _channels(1, 2, 2, stride=2, padding=(3, 4)), (Normal((1, 1, 3, 2)),)),
    Case("kernel as large as the input", _channels(2, 2, (3, 4)), (Normal((2, 2, 3, 4)),)),
    Case("same", _channels(2, 2, 3, padding="same"), (Normal((1, 2, 4, 3)),)),
    Case("same, odd padding", _channels(1, 2, (2, 4), padding="same", dilation=(3, 1)), (Normal((2, 1, 4, 3)),)),
    Case("groups", _channels(4, 6, 2, groups=2, padding=1), (Normal((2, 4, 2, 3)),)),
    Case("depthwise", _channels(3, 3, 3, groups=3, padding=1), (Normal((2, 3, 3, 3)),)),
    Case("depthwise, two kernels a channel", _channels(2, 4, 2, groups=2, stride=2), (Normal((2, 2, 4, 3)),)),
    Case("reflect", _channels(1, 2, 3, padding=(1, 2), padding_mode="reflect"), (Normal((2, 1, 3, 4)),)),
    Case("replicate", _channels(1, 2, 3, padding=2, padding_mode="replicate"), (Normal((2, 1, 2, 3)),)),
    Case("circular", _channels(1, 2, 3, padding=(2, 1), padding_mode="circular"), (Normal((2, 1, 3, 3)),)),
    Case("same, circular", _channels(1, 2, 2, padding="same", padding_mode="circular"), (Normal((2, 1, 3, 3)),)),
    Case("channels last", _channels(3, 4, 2, padding=1), (Normal((2, 3, 3, 2), layout="channels_last"),)),
    Case("transposed", _channels(2, 2, 2), (Normal((2, 2, 3, 4), layout="transposed"),)),
    Case("strided", _channels(2, 2, 2), (Normal((2, 2, 3, 3), layout="strided"),)),
    Case("frozen input", _channels(2, 3, 3, padding=1), (Normal((2, 2, 3, 3), gradient=False),)),
    Case("digits", _channels(16, 32, 3, padding=1), (Normal((64, 16, 8, 8)),), bench=True),
    Case("stem of a ResNet", _channels(3, 64, 7, stride=2, padding=3), (Normal((8, 3, 224, 224)),), bench=True),
    Case("first of a small network", _channels(3, 32, 5, stride=2), (Normal((16, 3, 96, 96)),), bench=True),
    Case("of a ResNet", _channels(64, 64, 3, padding=1, bias=False), (Normal((16, 64, 56, 56)),), bench=True),
    Case("of a small ResNet", _channels(16, 16, 3, padding=1, bias=False), (Normal((128, 16, 32, 32)),), bench=True),
    Case("wide", _channels(256, 256, 3, padding=1, bias=False), (Normal((16, 256, 14, 14)),), bench=True),
    Case("128 channels", _channels(128, 128, 3, padding=1), (Normal((8, 128, 28, 28)),), bench=True),
    Case(
        "depthwise of a mobile network",
        _channels(96, 96, 3, padding=1, groups=96),
        (Normal((8, 96, 56, 56)),),
        bench=True,
    ),
    Case("pointwise", _channels(256, 64, 1, bias=False), (Normal((16, 256, 56, 56)),), bench=True),
    Case("depthwise, wide", _channels(128, 128, 3, padding=1, groups=128), (Normal((16, 128, 56, 56)),), bench=True),
    Case("image patches", _channels(3, 768, 16, stride=16), (Normal((8, 3, 224, 224), gradient=False),), bench=True),
)
