"""What the pages of the server say beside their subject, in every language that there is."""

from __future__ import annotations

from giong.sizing.questions import Language

WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "title": "giong",
        "home": "All pages",
        "failed": "This did not work: {reason}",
        "api": "Programs ask this server as they ask OpenAI's, at",
        "models": "Models",
        "compare": "Blind comparison",
        "compare_what": "Two answers to the same request, and nobody is told who wrote which: choose the better one.",
        "advise": "Questions of the advisor",
        "advise_what": "What no figure shows (licence, consent, sources, hours), and the verdict that follows.",
    },
    "vi": {
        "title": "giong",
        "home": "Mọi trang",
        "failed": "Không thực hiện được: {reason}",
        "api": "Chương trình hỏi máy chủ này như hỏi OpenAI, tại",
        "models": "Các mô hình",
        "compare": "So sánh ẩn danh",
        "compare_what": "Hai bài trả lời cho cùng một yêu cầu, không ai biết bài nào của ai: hãy chọn bài hay hơn.",
        "advise": "Câu hỏi của cố vấn",
        "advise_what": "Những gì không số đo nào cho thấy (giấy phép, sự đồng ý, nguồn, giờ công), và kết luận rút ra từ đó.",
    },
}

ADVISE: dict[Language, dict[str, str]] = {
    "en": {
        "title": "Questions of the advisor",
        "open": "not answered",
        "save": "Write into giong.yaml",
        "saved": "Written into giong.yaml, section advice.",
        "verdict": "Verdict",
        "driven": "The answer that decided it",
        "no_verdict": "The answers count as soon as there is an evaluation. Next: giong run",
        "go": "go",
        "combine": "combine",
        "collect more": "collect more",
        "prompt instead": "prompt instead",
        "retrieve": "retrieve",
        "no-go": "no-go",
    },
    "vi": {
        "title": "Câu hỏi của cố vấn",
        "open": "chưa trả lời",
        "save": "Ghi vào giong.yaml",
        "saved": "Đã ghi vào giong.yaml, mục advice.",
        "verdict": "Kết luận",
        "driven": "Câu trả lời quyết định",
        "no_verdict": "Các câu trả lời có hiệu lực ngay khi có kết quả đánh giá. Tiếp theo: giong run",
        "go": "nên tinh chỉnh",
        "combine": "kết hợp",
        "collect more": "thu thập thêm",
        "prompt instead": "dùng câu lệnh",
        "retrieve": "tra cứu",
        "no-go": "không nên dùng",
    },
}
