"""Chat templates of LLaVA's checkpoints, as Jinja."""

from __future__ import annotations

#: llava-hf's as it is on the hub.
HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: lmms-lab's conversation `qwen_1_5`; one <image> stands for the whole video.
QWEN_1_5_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
