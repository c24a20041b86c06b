"""What FlashAttention-3's build left out: here what these functions refuse, fp8."""

_SWITCHES = (
    "BACKWARD SPLIT PAGEDKV APPENDKV LOCAL SOFTCAP PACKGQA FP16 FP8 VARLEN CLUSTER HDIM64 HDIM96 "
    "HDIM128 HDIM192 HDIM256 SM8x HDIMDIFF64 HDIMDIFF192"
)

CONFIG = {
    "build_flags": {f"FLASHATTENTION_DISABLE_{name}": name == "FP8" for name in _SWITCHES.split()}
}
