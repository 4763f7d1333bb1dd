"""What a rater reads, in every language that there is, for the terminal and the page alike."""

from __future__ import annotations

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Blind comparison",
        "preference": "Which answer is better?",
        "author": "Which one did {author} write?",
        "the_author": "the author",
        "request": "Request",
        "left": "Left",
        "right": "Right",
        "tie": "No difference",
        "unsure": "Cannot tell",
        "back": "Back",
        "empty": "(an empty answer)",
        "name": "Your name",
        "begin": "I agree, begin",
        "keys": "Keys: 1 or ← left, 2 or → right, 0 {tie}, B back.",
        "prompt": "1 left, 2 right, 0 {tie}, b back, q stop: ",
        "position": "{number} of {total}",
        "done": "That was the last pair. Thank you.",
        "consent": (
            "Your name, the time and each of your choices are kept in votes.jsonl of this project, on this machine. They are used to "
            "compare the models, and may be exported to train models. Your name is left out of exports unless it is asked for."
        ),
        "agree": "Do you agree?",
    },
    "vi": {
        "title": "So sánh ẩn danh",
        "preference": "Bài nào hay hơn?",
        "author": "Bài nào do {author} viết?",
        "the_author": "chính tác giả",
        "request": "Yêu cầu",
        "left": "Bên trái",
        "right": "Bên phải",
        "tie": "Không khác nhau",
        "unsure": "Không phân biệt được",
        "back": "Quay lại",
        "empty": "(bài trống)",
        "name": "Tên của bạn",
        "begin": "Tôi đồng ý, bắt đầu",
        "keys": "Phím: 1 hoặc ← bên trái, 2 hoặc → bên phải, 0 {tie}, B quay lại.",
        "prompt": "1 bên trái, 2 bên phải, 0 {tie}, b quay lại, q dừng: ",
        "position": "{number} trên {total}",
        "done": "Đây là cặp cuối cùng. Xin cảm ơn bạn.",
        "consent": (
            "Tên của bạn, thời điểm và từng lựa chọn của bạn được lưu trong tệp votes.jsonl của dự án này, trên máy này. Chúng được dùng "
            "để so sánh các mô hình và có thể được xuất ra để huấn luyện mô hình. Tên của bạn không có trong tệp xuất ra, trừ khi người "
            "xuất yêu cầu."
        ),
        "agree": "Bạn có đồng ý không?",
    },
}


def words_for(language: str, mode: str, author: str) -> dict[str, str]:
    """The words of a language with question and tie as the mode has them, and the author's name filled in."""
    words = WORDS[language]
    tie = words["tie" if mode == "preference" else "unsure"]
    filled = {key: words[key].replace("{tie}", tie[0].lower() + tie[1:]) for key in ("keys", "prompt")}
    return {**words, **filled, "tie": tie, "question": words[mode].replace("{author}", author or words["the_author"])}
