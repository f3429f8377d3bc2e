"""Personal data left in text: found by pattern, counted by kind, and masked where that is asked for.

Patterns find what has a form: mainland China's telephone and ID numbers, e-mail, WeChat and QQ ids, web addresses, in digits
of either width. Names and addresses have none, and stay.
"""

import re
from collections import Counter

MASKS = {
    "email": "[邮箱]",
    "url": "[网址]",
    "id_number": "[身份证号]",
    "wechat": "[微信号]",
    "qq": "[QQ号]",
    "phone": "[电话]",
}
_SUSPICIOUS = re.compile(r"[0-9]{5}|[0-9]{3}[- ][0-9]{3,4}|@|://|www\.|微信|(?i:wechat|weixin|qq|[vw]x|加\s*v)")
# in this order: an address may hold an @, a WeChat id may be a phone number
PATTERNS = {
    "url": re.compile(r"(?:https?://|www\.)[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+", re.IGNORECASE),
    "email": re.compile(r"[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)+"),
    "id_number": re.compile(r"(?<![0-9])[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:[0-2][0-9]|3[01])[0-9]{3}[0-9Xx](?![0-9])"),
    "wechat": re.compile(
        r"(?:微信|(?<![A-Za-z0-9])(?i:wechat|weixin))\s*(?:号|账号|id)?\s*(?:是|为)?\s*[:：]?\s*([A-Za-z][A-Za-z0-9_\-]{5,19}|1[3-9][0-9]{9})"
        r"|(?:加\s*[vV]|(?<![A-Za-z0-9])(?i:[vw]x))(?:[号是为:：\s]+([A-Za-z][A-Za-z0-9_\-]{5,19})|\s*(1[3-9][0-9]{9}))"  # words begin with wx, too
    ),
    "qq": re.compile(r"(?:(?<![A-Za-z0-9])(?i:qq)|扣扣)\s*(?:群|号|号码)?\s*(?:是|为)?\s*[:：]?\s*([1-9][0-9]{4,10})(?![0-9])"),
    "phone": re.compile(
        r"(?<![0-9])(?:(?:\+?86[- ]?)?1[3-9][0-9][- ]?[0-9]{4}[- ]?[0-9]{4}"  # mobile
        r"|\(?0(?:10|2[0-9]|[3-9][0-9]{2})(?:\)[- ]?|[- ]?)[2-8][0-9]{2,3}[- ]?[0-9]{4}"  # landline with its area code
        r"|[48]00[- ]?[0-9]{3,4}[- ]?[0-9]{3,4})(?![0-9])"  # 400 and 800 numbers
    ),
}  # fmt: skip
NARROW = str.maketrans("０１２３４５６７８９（）－＠：", "0123456789()-@:")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask(text: str) -> tuple[str, Counter]:
    """Return the text with each piece of personal data replaced by its kind's mask, and how many of each kind there were."""
    counts: Counter = Counter()
    plain = text.translate(NARROW)  # as long as the text, so that places are the same
    if not _SUSPICIOUS.search(plain):
        return text, counts
    for kind, pattern in PATTERNS.items():
        for match in reversed([*pattern.finditer(plain)]):
            if kind == "id_number" and not is_id_number(match[0]):
                continue
            counts[kind] += 1
            start, end = match.span(match.lastindex or 0)  # of an id alone; the words before it stay
            text, plain = (one[:start] + MASKS[kind] + one[end:] for one in (text, plain))
    return text, counts


def is_id_number(digits: str) -> bool:
    """Say whether the 18th digit is the check digit of the 17 before it (GB 11643-1999, ISO 7064 MOD 11-2)."""
    remainder = sum(int(digit) * weight for digit, weight in zip(digits[:17], _WEIGHTS, strict=True)) % 11
    return digits[17].upper() == "10X98765432"[remainder]
