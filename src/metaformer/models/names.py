"""Names of the paper's networks, in the paper's order; `variants` defines them. Imports nothing that is slow."""

NAMES = (
    "poolformer_s12",
    "poolformer_s24",
    "poolformer_s36",
    "poolformer_m36",
    "poolformer_m48",
    "metaformer_s12_identity",
    "metaformer_s12_random_matrix",
    "metaformer_s12_depthwise_conv",
    "metaformer_s12_pool5",
    "metaformer_s12_pool7",
    "metaformer_s12_pool9",
    "metaformer_s12_layer_norm",
    "metaformer_s12_batch_norm",
    "metaformer_s12_no_norm",
    "metaformer_s12_relu",
    "metaformer_s12_silu",
    "metaformer_s12_no_residual",
    "metaformer_s12_no_channel_mlp",
    "metaformer_s12_pppa",
    "metaformer_s12_ppaa",
    "metaformer_s12_pppf",
    "metaformer_s12_ppff",
)


def list_models() -> list[str]:
    """Return the names that `create_model` accepts."""
    return list(NAMES)
