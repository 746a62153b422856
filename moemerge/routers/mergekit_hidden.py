"""Routers as mergekit-moe computes them for its `hidden`: for comparison, and to reproduce its models.

It reads the residual stream that enters the layer at each prompt's last token, which the router never sees; rows have
length 1, and are neither centred nor scaled. https://github.com/arcee-ai/mergekit/blob/main/mergekit/moe/router.py
"""

import torch

from moemerge.routers.pass_inputs import LayerRows, PassRequest, RouterInputs


def mergekit_hidden_rows(inputs: RouterInputs, request: PassRequest) -> LayerRows:
    """Make a layer's rows `u(mean over positive prompts - mean over negative ones)`; zeros for absent experts."""
    assert inputs.entering is not None  # noqa: S101  asked for by the request
    rows = torch.zeros(len(request.mixture.expert_widths), inputs.entering.shape[1])
    for expert in request.present(inputs.layer):
        signs = {
            sign: [i for i, p in enumerate(inputs.prompts) if p.expert == expert and p.positive == sign]
            for sign in (True, False)
        }
        row = inputs.entering[signs[True]].mean(dim=0)
        if signs[False]:
            row = row - inputs.entering[signs[False]].mean(dim=0)
        rows[expert] = torch.nn.functional.normalize(row, dim=0)
    return LayerRows(rows)
