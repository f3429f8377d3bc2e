"""What everybody who talks to a model reads first, in one place: the chat page, the terminal chat, the model card."""

TITLE = "MedAsst 中文医疗助手"
NOTICE_ZH = (
    "这不是医生。回答由模型生成，可能有错，不能代替面诊，不要据此自行用药或停药。"
    "胸痛、呼吸困难、意识不清、大出血、有轻生念头等紧急情况，请立即拨打 120 或前往急诊。"
)
NOTICE_EN = (
    "This is no doctor. A model writes the answers; they can be wrong and replace no physician: start or stop no medicine "
    "because of them. In an emergency call 120 (in China) or your local emergency number."
)
