"""One small model of each family, for CI; fixed here so that nothing has to be built to choose it.

The smallest one by parameters that timm 1.0.31 and torchvision 0.29 have. A family that has none of
at most 15 million, or none that is quick, is left out with its reason; the whole run has it.
"""

from __future__ import annotations

from zoo_models import Model

_TIMM = """
    test_byobnet coat_tiny test_convnext cpubone_nano crossvit_9_dagger_240 csatv2
    cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0
    efficientvit_m0 fasternet_t0 fastvit_t8 gcvit_xxtiny ghostnet_050 halonet_h1 hardcorenas_b
    hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto lcnetv2_small levit_128s lowformer_b0
    test_mambaout test_coatnet poolformerv2_s12 mobilenetv3_small_050 mobilevit_xxs test_nfnet
    pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1 resnest14d test_resnet resnetv2_18
    rexnet_100 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224
    visformer_tiny vit_tiny_r_s16_p8_224 ese_vovnet19b_slim_dw xcit_nano_12_p8_224
"""
_TORCHVISION = """
    densenet121 ssdlite320_mobilenet_v3_large efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2
    mobilenet_v3_small raft_small quantized_googlenet quantized_mobilenet_v2
    quantized_mobilenet_v3_large quantized_resnet18 quantized_shufflenet_v2_x0_5 regnet_y_400mf
    resnet18 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large shufflenet_v2_x0_5
    squeezenet1_1 mc3_18 s3d
"""
SAMPLE = (
    *(Model("timm", name) for name in _TIMM.split()),
    *(Model("torchvision", name) for name in _TORCHVISION.split()),
)
