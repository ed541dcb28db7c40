"""Names of the tensors of a LLaVA checkpoint in any layout, and of a SigLIP's pooling head."""

from __future__ import annotations

#: Names on disk, in any layout, → canonical names; the first rule that matches. None leaves a tensor out.
LLAVA_RULES = [
    (r".*(\.inv_freq|\.position_ids)$", None),
    (r"(model\.)?(language_model\.)?lm_head\.", "lm_head."),
    (r"(model\.)?language_model\.(model\.)?", "decoder."),
    (r"(model\.)?multi_modal_projector\.", "projector."),
    (r"model\.mm_projector\.0\.", "projector.linear_1."),
    (r"model\.mm_projector\.2\.", "projector.linear_2."),
    (r"(model\.)?image_newline$", "newline"),
    (r".*vision_tower\..*\bhead\.", None),  # a tower saved with a pooling head: the salience takes SigLIP's own
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "tower."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "decoder."),
]
SIGLIP_RULES = [
    (r"(vision_model\.)?head\.", "head."),
    (r".*", None),
]
