"""The languages that Whisper knows, by their codes. Source: the order of the language tokens in OpenAI's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


def _table(text: str) -> Mapping[str, str]:
    return MappingProxyType(dict(each.strip().split(" ", 1) for each in text.split(",")))


# In the order of their tokens. The last one came with the third version of the large model.
NAMES: Final = _table(
    """
    en english, zh chinese, de german, es spanish, ru russian, ko korean, fr french, ja japanese, pt portuguese,
    tr turkish, pl polish, ca catalan, nl dutch, ar arabic, sv swedish, it italian, id indonesian, hi hindi,
    fi finnish, vi vietnamese, he hebrew, uk ukrainian, el greek, ms malay, cs czech, ro romanian, da danish,
    hu hungarian, ta tamil, no norwegian, th thai, ur urdu, hr croatian, bg bulgarian, lt lithuanian, la latin,
    mi maori, ml malayalam, cy welsh, sk slovak, te telugu, fa persian, lv latvian, bn bengali, sr serbian,
    az azerbaijani, sl slovenian, kn kannada, et estonian, mk macedonian, br breton, eu basque, is icelandic,
    hy armenian, ne nepali, mn mongolian, bs bosnian, kk kazakh, sq albanian, sw swahili, gl galician, mr marathi,
    pa punjabi, si sinhala, km khmer, sn shona, yo yoruba, so somali, af afrikaans, oc occitan, ka georgian,
    be belarusian, tg tajik, sd sindhi, gu gujarati, am amharic, yi yiddish, lo lao, uz uzbek, fo faroese,
    ht haitian creole, ps pashto, tk turkmen, nn nynorsk, mt maltese, sa sanskrit, lb luxembourgish, my myanmar,
    bo tibetan, tl tagalog, mg malagasy, as assamese, tt tatar, haw hawaiian, ln lingala, ha hausa, ba bashkir,
    jw javanese, su sundanese, yue cantonese
    """
)

# Other codes and names that people use, and the codes of the same languages.
_ALIASES: Final = _table(
    """
    iw he, in id, ji yi, jv jw, nb no, fil tl, cmn zh, mandarin zh, burmese my, castilian es, flemish nl,
    haitian ht, panjabi pa, letzeburgesch lb, moldavian ro, moldovan ro, pushto ps, sinhalese si, valencian ca,
    farsi fa
    """
)
_CODES: Final = {name: code for code, name in NAMES.items()}


def code_of(text: str) -> str | None:
    """Return the code of a language that is called by its code, with a region or not, or by its English name; None for
    one that Whisper does not know.
    """
    word = text.strip().lower()
    for each in (word, word.replace("_", "-").partition("-")[0]):
        code = _ALIASES.get(each) or _CODES.get(each, each)
        if code in NAMES:
            return code
    return None
