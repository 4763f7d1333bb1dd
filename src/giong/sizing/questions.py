"""The questions of `giong advise`, in the order they are asked, and what follows from an answer that drives the verdict.

In English and Vietnamese, because they are asked of a person. Standard library only: the report shows them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Language = Literal["en", "vi"]
Words = dict[Language, str]


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the advisor and, where its answer can drive the verdict, the sentence that says so.

    `options` are the answers to choose from, by the name that giong.yaml has for them, `many` says that several may be; without options a
    number is asked for.
    """

    text: Words
    reason: Words = field(default_factory=dict)
    options: dict[str, Words] = field(default_factory=dict)
    many: bool = False

    def prompt(self, language: Language) -> str:
        """The question with its options behind it, for where they cannot be pointed at."""
        if not self.options or self.options is YES_NO:
            return self.text[language]
        listed = ", ".join(name if name == words[language] else f"{name}: {words[language]}" for name, words in self.options.items())
        return f"{self.text[language]} ({listed}{SEVERAL[language] if self.many else ''})"


YES_NO: dict[str, Words] = {"true": {"en": "yes", "vi": "có"}, "false": {"en": "no", "vi": "không"}}
SEVERAL: Words = {"en": "; several with commas", "vi": "; cách nhau bằng dấu phẩy"}

QUESTIONS: dict[str, Question] = {
    "goals": Question(
        {"en": "Which aspects should improve?", "vi": "Cần cải thiện khía cạnh nào?"},
        {
            "en": "What should improve are facts, and fine-tuning is a poor way to teach them: let the model look them up.",
            "vi": "Điều cần cải thiện là kiến thức, mà tinh chỉnh dạy kiến thức rất kém: hãy để mô hình tra cứu.",
        },
        {
            "voice": {"en": "voice", "vi": "giọng văn"},
            "format": {"en": "format", "vi": "hình thức"},
            "facts": {"en": "facts", "vi": "kiến thức"},
            "skill": {"en": "skill", "vi": "kỹ năng"},
            "cost": {"en": "cost", "vi": "chi phí"},
            "privacy": {"en": "privacy", "vi": "riêng tư"},
        },
        many=True,
    ),
    "knowledge_changes": Question(
        {
            "en": "How often does the knowledge behind the answers change?",
            "vi": "Kiến thức trong câu trả lời thay đổi thường xuyên đến mức nào?",
        },
        {
            "en": "The knowledge changes too often to be trained in: let the model look it up.",
            "vi": "Kiến thức thay đổi quá thường xuyên để huấn luyện vào mô hình: hãy để mô hình tra cứu.",
        },
        {
            "never": {"en": "never", "vi": "không bao giờ"},
            "yearly": {"en": "yearly", "vi": "hằng năm"},
            "monthly": {"en": "monthly", "vi": "hằng tháng"},
            "daily": {"en": "daily", "vi": "hằng ngày"},
        },
    ),
    "must_cite": Question(
        {"en": "Must answers cite their sources?", "vi": "Câu trả lời có phải dẫn nguồn không?"},
        {
            "en": "Answers must cite sources, and a tuned model does not know where it has something from: retrieve the passages.",
            "vi": "Câu trả lời phải dẫn nguồn, mà mô hình tinh chỉnh không biết mình lấy thông tin từ đâu: hãy truy xuất đoạn văn gốc.",
        },
        YES_NO,
    ),
    "may_imitate": Question(
        {"en": "May this person be imitated?", "vi": "Người này có cho phép bắt chước giọng văn không?"},
        {
            "en": "This person may not be imitated: nothing that is measured changes that.",
            "vi": "Người này không cho phép bắt chước: không số đo nào thay đổi được điều đó.",
        },
        YES_NO,
    ),
    "base_licensed": Question(
        {"en": "Does the licence of the base model allow this use?", "vi": "Giấy phép của mô hình gốc có cho phép cách dùng này không?"},
        {
            "en": "The licence of the base model does not allow this use: take another base.",
            "vi": "Giấy phép của mô hình gốc không cho phép cách dùng này: hãy chọn mô hình gốc khác.",
        },
        YES_NO,
    ),
    "base_tunable": Question(
        {
            "en": "Can this base be tuned at all (here, or at a provider that still takes jobs)?",
            "vi": "Mô hình gốc này có tinh chỉnh được không (tại đây, hoặc ở nhà cung cấp còn nhận)?",
        },
        {
            "en": "This base cannot be tuned: prompting is what is left.",
            "vi": "Mô hình gốc này không tinh chỉnh được: chỉ còn cách viết câu lệnh.",
        },
        YES_NO,
    ),
    "human_hours": Question(
        {
            "en": "How many hours of human work are there for data and evaluation?",
            "vi": "Có bao nhiêu giờ công cho việc chuẩn bị dữ liệu và đánh giá?",
        },
        {
            "en": "The writing that is missing takes about {needed:.0f} hours to collect ({minutes} minutes a passage), and there are {given:g}.",
            "vi": "Thu thập phần văn bản còn thiếu mất khoảng {needed:.0f} giờ ({minutes} phút mỗi đoạn), mà chỉ có {given:g} giờ.",
        },
    ),
    "reused": Question(
        {"en": "Will the same base be used for other domains too?", "vi": "Mô hình gốc này còn được dùng cho lĩnh vực khác không?"},
        options=YES_NO,
    ),
}
