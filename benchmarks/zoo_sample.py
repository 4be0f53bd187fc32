"""One small model of each family, for CI; fixed here so that nothing has to be built to choose it.

The smallest one by parameters. A family that has none of at most 15 million parameters, or none
that is quick, is left out with its reason; the whole run has it.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo_models import Model

_TIMM = """
    test_byobnet coat_tiny test_convnext cpubone_nano crossvit_9_dagger_240
    cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0
    efficientvit_m0 fasternet_t0 fastvit_t8 gcvit_xxtiny hardcorenas_b
    hgnetv2_b0 iformer_t inception_next_atto lcnetv2_small levit_128s lowformer_b0
    test_mambaout test_coatnet poolformerv2_s12 mobilenetv3_small_050 mobilevit_xxs test_nfnet
    pit_ti_224 pvt_v2_b0 regnetx_002 repvit_m1 resnest14d test_resnet resnetv2_18
    rexnet_100 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224
    visformer_tiny vit_tiny_r_s16_p8_224 ese_vovnet19b_slim_dw
"""
_TORCHVISION = """
    ssdlite320_mobilenet_v3_large efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2
    mobilenet_v3_small raft_small quantized_resnet18 regnet_y_400mf resnet18
    lraspp_mobilenet_v3_large shufflenet_v2_x0_5 squeezenet1_1 mc3_18
"""
SAMPLE = (
    *(Model("timm", name) for name in _TIMM.split()),
    *(Model("torchvision", name) for name in _TORCHVISION.split()),
)

# What the choice was made of; other versions may have more.
VERSIONS = {"timm": "1.0.31", "torchvision": "0.29."}
# The smallest model of the family, and its parameters in millions.
_LARGE = {
    "timm": """
        convmixer_768_32 21.1 davit_tiny 28.4 focalnet_tiny_srf 28.4 hiera_tiny_224 27.9
        sam2_hiera_tiny 26.9 inception_resnet_v2 55.8 inception_v3 23.8 inception_v4 42.7
        mobilenetv5_base 82.6 mvitv2_tiny 24.2 nasnetalarge 88.8 nest_tiny 17.1 nextvit_small 31.8
        pnasnet5large 86.1 rdnet_tiny 23.9 res2next50 24.7 selecsls42 30.4
        tnt_s_legacy_patch16_224 23.8 tresnet_m 31.4 twins_svt_small 24.1 vgg11 132.9
        samvit_base_patch16 89.7 vitamin_small_224 22.2 volo_d1_224 26.6 legacy_xception 22.9
        xception41p 26.9
    """,
    "torchvision": """
        alexnet 61.1 convnext_tiny 28.6 fasterrcnn_mobilenet_v3_large_320_fpn 19.4
        fcos_resnet50_fpn 32.3 keypointrcnn_resnet50_fpn 59.2 maskrcnn_resnet50_fpn 44.5
        retinanet_resnet50_fpn 34.1 ssd300_vgg16 35.6 inception_v3 27.2 maxvit_t 30.9
        quantized_inception_v3 27.2 fcn_resnet50 33.0 vgg11 132.9 mvit_v2_s 34.5
    """,
}
_SLOW: Mapping[Model, str] = {
    Model("timm", "csatv2"): "slow, with 46 convolutions",
    Model("timm", "ghostnet_050"): "slow; tests/swaps.py has ghostnet_100",
    Model("timm", "halonet_h1"): "slow: one forward pass takes seconds",
    Model("timm", "hrnet_w18_small"): "slow, with 65 convolutions",
    Model("timm", "repghostnet_050"): "slow; much as ghostnet_050",
    Model("timm", "xcit_nano_12_p8_224"): "slow: tokens of 8×8 pixels",
    Model("torchvision", "densenet121"): "slow; timm's is in the sample",
    Model("torchvision", "deeplabv3_mobilenet_v3_large"): "slow; tests/swaps.py has it",
    Model("torchvision", "quantized_googlenet"): "slow; googlenet with stubs between",
    Model("torchvision", "quantized_mobilenet_v2"): "slow; mobilenet_v2 with stubs between",
    Model("torchvision", "quantized_mobilenet_v3_large"): "slow; a mobilenet_v3 with stubs between",
    Model("torchvision", "quantized_shufflenet_v2_x0_5"): "slow; shufflenet_v2_x0_5 with stubs",
    Model("torchvision", "s3d"): "slow: it takes clips of 16×224×224",
}


def _large() -> Mapping[Model, str]:
    words = {library: text.split() for library, text in _LARGE.items()}
    return {
        Model(library, name): f"{millions} million parameters"
        for library, found in words.items()
        for name, millions in zip(found[::2], found[1::2], strict=True)
    }


LEFT_OUT: Mapping[Model, str] = {**_large(), **_SLOW}
# Families all of whose convolutions cut patches or look at one pixel; there is nothing to swap.
_WITHOUT = """
    beit cait convit deepseek_vit deit eva gemma4_vit mlp_mixer naflexvit qwen3_vit sequencer
    swin_transformer swin_transformer_v2 swin_transformer_v2_cr vision_transformer
    vision_transformer_relpos
"""
WITHOUT = (
    *(f"timm {name}" for name in _WITHOUT.split()),
    "torchvision swin_transformer",
    "torchvision video.swin_transformer",
    "torchvision vision_transformer",
)
