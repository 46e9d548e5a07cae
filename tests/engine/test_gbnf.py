"""GBNF grammars through llguidance: against tables, against sets of texts computed here, and against llama.cpp."""

from __future__ import annotations

import itertools
import re
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.llamacpp import lltokenizer_from_vocab

from llamaserve.engine import lark
from llamaserve.engine.gbnf import GrammarError
from llamaserve.engine.llama import NativeSampler, Vocab


class _Bytes:
    """A vocabulary of the 256 bytes and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _matcher(tokenizer: LLTokenizer, lark: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def _reader(grammar: str) -> Callable[[str], bool]:
    """Return what tells whether a text is one that the grammar describes."""
    start = _matcher(_byte_tokenizer(), lark.from_gbnf(grammar))

    def accepts(text: str) -> bool:
        matcher = start.deep_copy()
        read = matcher.try_consume_tokens(list(text.encode()))
        return read == len(text.encode()) and matcher.is_accepting()

    return accepts


def _is_regex(grammar: str) -> bool:
    """Whether the grammar became a single lexeme."""
    return "start: T" in lark.from_gbnf(grammar)


def _recursive(grammar: str) -> str:
    """The same grammar, or in brackets, which no regular expression describes."""
    return 'root ::= inner | "<" root ">"\n' + re.sub(r"\broot(?=\s*::=)", "inner", grammar)


_JSON = r"""
# the grammar of llama.cpp's examples, in other words
root    ::= object
value   ::= object | array | string | number | ("true" | "false" | "null") ws
object  ::= "{" ws (
              string ":" ws value
              ("," ws string ":" ws value)*  # the others
            )? "}" ws
array   ::= "[" ws ( value ("," ws value)* )? "]" ws
string  ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number  ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [0-9]{0,15})? ws
ws      ::= | " " | "\n" [ \t]{0,20}
"""
_CHESS = r"""
root     ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move     ::= (pawn | nonpawn | castle) [+#]?
nonpawn  ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn     ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle   ::= "O-O" "-O"?
"""
_ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
_LIST = 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029"]+ ("\\"" [^"\\n]* "\\"")? "\\n"'
_CSV = r"""
root   ::= line+
line   ::= field ("," field)* "\r"? "\n"
field  ::= quoted | [^",\r\n]*
quoted ::= "\"" ([^"] | "\"\"")* "\""
"""
_MARKUP = r"""
root ::= node
node ::= "<" name (" " name "=" "\"" [^"<]* "\"")* (">" (node | text)* "</" name ">" | "/>")
name ::= [a-z]+
text ::= [^<] | "<!--" [a-z ]* "-->"
"""
_CODE = r"""
root    ::= (statement | comment)+
statement ::= name " = " value ";\n"
value   ::= name | number | string | "(" value ([-+*/] value)* ")"
comment ::= "//" [^\n]* "\n"
name    ::= [a-z]+
number  ::= [0-9]+
string  ::= "\"" content "\"" | "'" [^']* "'"
content ::= ([^"\\] | "\\" .)*
"""
_SCHEMA = r"""
char    ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
space   ::= | " " | "\n"{1,2} [ \t]{0,20}
string  ::= "\"" char* "\"" space
date    ::= "\"" [0-9]{4} "-" ([0] [1-9] | [1] [0-2]) "-" [0-3] [0-9] "\"" space
kind    ::= ("\"file\"" | "\"folder\"") space
name-kv ::= "\"name\"" space ":" space string
date-kv ::= "\"date\"" space ":" space date
kind-kv ::= "\"kind\"" space ":" space kind
inside  ::= "[" space (root ("," space root)*)? "]" space
more-k  ::= ["] ( [n] ([a] char+ | [^"a] char*) | [^"n] char* )? ["] space
root    ::= "{" space name-kv "," space date-kv "," space kind-kv
            ( "," space ( "\"inside\"" space ":" space inside | more-k ":" space string ) )? "}" space
""".replace("kind-kv\n            (", "kind-kv (")
_GREETING = 'root ::= ("こんにちは" | "Grüße" | "привет") "、"? [א-תа-яё]+ [😀-🙏]*'
_TAGS = r"""
root ::= "{" pairs "}"
pairs ::= pair (", " pair)*
pair ::= [a-zéü]+ ": " ("'" [^']* "'" | root)
"""


# What is accepted and what is not


@pytest.mark.parametrize(
    ("grammar", "accepted", "rejected"),
    [
        ('root ::= "a"', ["a"], ["", "b", "aa"]),
        ("root ::= a a\na ::= [a-z]+", ["ab", "abc"], ["", "a", "ab1"]),
        ('root ::= "a" "bc" | "ab" "d"', ["abc", "abd"], ["ab", "abcd"]),
        ('root ::= | "a" |', ["", "a"], ["aa"]),
        ('root ::= ""', [""], ["a"]),
        ("root ::=", [""], ["a"]),
        ('root ::= "" | "x"', ["", "x"], ["xx"]),
        ('root ::= ("a" | "b")* "c"', ["c", "abbac"], ["", "ab"]),
        ('root ::= "a"?', ["", "a"], ["aa"]),
        ('root ::= "ab"{2}', ["abab"], ["ab", "ababab", "abb"]),
        ('root ::= "ab"{2,}', ["abab", "ababab"], ["ab"]),
        ('root ::= "a"{1,3}', ["a", "aaa"], ["", "aaaa"]),
        ('root ::= "a"{ 1 ,\t3 }', ["a", "aaa"], ["", "aaaa"]),
        ('root ::= "x" "a"{0} "y"', ["xy"], ["xay"]),
        ('root ::= "x" "a"{0}* "y"', ["xy"], ["xay", "xxy"]),
        ('root ::= ""{3} "y"', ["y"], [""]),
        ('root ::= [a]{2,} "a"', ["aaa", "aaaaa"], ["a", "aa"]),
        ('root ::= [a]{2,3} "a"', ["aaa", "aaaa"], ["aa", "aaaaa"]),
        ('root ::= ("a"{2}){3}', ["aaaaaa"], ["aa", "aaaaa"]),
        ('root ::= "a"{2}{3}', ["aaaaaa"], ["aa", "aaaaa"]),
        ('root ::= "a"+?', ["", "a", "aa"], ["b"]),
        ('root ::= "ab"*+', ["", "ab", "abab"], ["aba"]),
        ("root ::= x*\nx ::= y*\ny ::= [a]?", ["", "a", "aaa"], ["b"]),
        ("root ::= .", ["a", "\n", "é", "😀", "\x01"], ["", "ab", "\x00"]),
        ("root ::= [^a]", ["b", "\n", "é", "😀"], ["a", "", "\x00"]),
        ("root ::= [^a-cé\\n]+", ["d", "xyz", "è"], ["a", "é", "\n", "xb"]),
        ("root ::= [a-cx-z0]", ["a", "c", "y", "0"], ["d", "-", "1"]),
        ("root ::= [a-]", ["a", "-"], ["b"]),
        ("root ::= [-a]", ["a", "-"], ["b"]),
        ("root ::= [a-c-e]", ["a", "b", "-", "e"], ["d"]),
        (r"root ::= [a\-c]", ["a", "-", "c"], ["b"]),
        ("root ::= [a^]", ["a", "^"], ["b"]),
        (r"root ::= [\]\[\\/#]", ["]", "[", "\\", "/", "#"], ["a"]),
        ("root ::= [ab\ncd]", ["a", "\n", "d"], ["n"]),
        ('root ::= "a\nb"', ["a\nb"], ["ab", "anb"]),
        (r'root ::= "\n\r\t\\\"\[\]\-/#"', ['\n\r\t\\"[]-/#'], ["nrt"]),
        (r'root ::= "\x41\u00e9\U0001F600\x7f"', ["Aé😀\x7f"], ["A"]),
        (r"root ::= [\x41-\x43\u00e9\U0001F600-\U0001F64F]", ["B", "é", "😃"], ["D", "e"]),
        ('root ::= "é" [à-ÿ]', ["éé", "éà"], ["éa", "é"]),
        (r"root ::= [\x00-\x1f]", ["\n", "\x1f"], ["\x00", " "]),
        (r"root ::= [\x00-\UFFFFFFFF]", ["a", "😀"], ["\x00"]),
        (r"root ::= [^\u0100-\uFFFF]", ["a", "😀"], ["Ā", "中"]),
        ('# first\n\n  root ::= # nothing\n # more\n "a" # end "b"\n# last', ["a"], ["ab"]),
        ('root\t::="a"|\n\n"b"|#c\n"c"', ["a", "b", "c"], ["ab"]),
        ('root ::= (\n"a"\n|\r\n"b" # or\n "c"\n)\r\n', ["a", "bc"], ["b", "c"]),
        ('root ::= "a" b\rb ::= "b"\r\nc ::= "c"', ["ab"], ["a"]),
        ("root ::= Rule-1_x 2\nRule-1_x ::= [x]\n2 ::= [y]", ["xy"], ["x"]),
        ("root ::= start if\nstart ::= [s]\nif ::= [i]", ["si"], ["s"]),
        ("root ::= A a\nA ::= [1]\na ::= [2]", ["12"], ["11", "22"]),
        ('root ::= "a"\nroot ::= "b"', ["b"], ["a"]),
        ('root ::= "a" missing\nroot ::= "b"', ["b"], ["a"]),
        ('root ::= "a"\nunused ::= unused', ["a"], [""]),
        ('root ::= "i" | "a"i\ni ::= "x"', ["i", "ax"], ["a", "A"]),
        ('root ::= "//" "%" "ignore" [/] "{" "}"', ["//%ignore/{}"], ["%ignore/{}"]),
    ],
)
def test_accepts_the_texts_that_a_grammar_describes(grammar: str, accepted: list[str], rejected: list[str]) -> None:
    accepts = _reader(grammar)
    assert _is_regex(grammar)
    assert [text for text in accepted if not accepts(text)] == []
    assert [text for text in rejected if accepts(text)] == []
    accepts = _reader(_recursive(grammar))
    assert not _is_regex(_recursive(grammar))
    assert [text for text in accepted if not (accepts(text) and accepts(f"<<{text}>>"))] == []
    assert [text for text in rejected if accepts(text) or accepts(f"<{text}>")] == []


@pytest.mark.parametrize(
    ("grammar", "accepted", "rejected"),
    [
        ('root ::= "(" root ")" |', ["", "()", "((()))"], ["(", ")", "()()"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["", "a", "ab"]),
        ('root ::= a root "c" | "b"\na ::= "x"?', ["b", "bc", "xxbcc", "xbcc"], ["xb"]),
        ('root ::= root root | "a" | ""', ["", "a", "aaa"], ["b"]),
        ('root ::= a | "x"\na ::= root | "y"', ["x", "y"], ["", "xy"]),
        ('root ::= "a" root? "b" | (root ","){2}', ["ab", "aabb", "ab,ab,"], ["ab,", "aab"]),
        ('root ::= "a" | dead{0} root "b"\ndead ::= dead', ["a", "abb"], ["b"]),
        # where the longest text of a lexeme is not the right one
        ("root ::= a a root?\na ::= [a-z]+", ["ab", "abcd"], ["", "a"]),
        ('root ::= "a" x "bc" | "ab" x "d"\nx ::= ("(" root ")")?', ["abc", "abd", "a(abd)bc"], ["ab", "abcd", "abc)"]),
        ('root ::= [a-c]+ x [b-d]+\nx ::= ("(" root ")")?', ["ab", "aab", "bb", "c(ad)d", "abcd"], ["a", "aa", "dd"]),
        ('root ::= [a]{2,} x "a"\nx ::= ("(" root ")")?', ["aaa", "aaaa", "aa(aaa)a"], ["aa", "aa(aa)a"]),
        ('root ::= [a]{2,3} x "a"\nx ::= ("(" root ")")?', ["aaa", "aaaa", "aaa(aaa)a"], ["aa", "aaaaa"]),
        ('root ::= [a]+ b? x [a]\nb ::= "b"?\nx ::= ("(" root ")")?', ["aa", "aaba", "a(aa)a"], ["a", "ab", "a(a)a"]),
        (
            'root ::= ws x ws "," ws\nws ::= " "*\nx ::= "x" | "(" root ")"',
            ["x,", "  x  , ", " ( x , ) , "],
            ["x", "(x),"],
        ),
        (
            'root ::= ([a-z]+ | "if" x | root " ")+\nx ::= "(" root ")"',
            ["if", "iff", "if(a if)", "a b "],
            ["(", "a(b)"],
        ),
        (
            'root ::= (x | [^<])*\nx ::= "<" root ">" | "<!" [^>]* ">"',
            ["", "ab", "<!b>", "<<!<>!>", "!<a>b"],
            ["<", "<!<"],
        ),
        (
            'root ::= "\\"" [^"]* "\\"" x? | "\\"\\"" "!"\nx ::= "+" root',
            ['"a"', '""', '""!', '"a"+""!'],
            ['"a"!', '""!+""'],
        ),
        # the same with the whole of it as one lexeme
        (_recursive('root ::= "a" "bc" | "ab" "d" | "abcde"'), ["abc", "abd", "abcde", "<abd>"], ["ab", "abcd"]),
        (_recursive('root ::= "/" "a" | "//" [^\\n]* "\\n"'), ["/a", "//\n", "//a/\n"], ["/", "//", "/a\n"]),
        (_recursive('root ::= [a-z]+ | "true" "!" | "truest"'), ["true", "true!", "truest", "tru"], ["tru!"]),
        (_recursive('root ::= "\\"" [^"]* "\\"" ("\\"" "x")?'), ['"a"', '"a""x'], ['"', '"a"x', '"a""']),
        (_recursive('root ::= "\\"" [^"]* "\\"" | "\\"" [0-9]{2} "-"'), ['"12-', '"12"', '"12-"'], ['"1-', '"12']),
        (_recursive('root ::= "\\"" [0-9] "-" | "\\"" . "\\"" . | "\\""'), ['"1-', '"""x', '"', '"1"2'], ['"1', '"1"']),
        (_recursive('root ::= [^"]* "x" [^"]+ "y"'), ["axby", "xxxyyy", "xay"], ["xy", "axb"]),
        (_recursive('root ::= ([a-z] | "é")+ "é" .*'), ["aé", "aéé", "ééa😀"], ["é", "a"]),
    ],
)
def test_recursive_grammars(grammar: str, accepted: list[str], rejected: list[str]) -> None:
    accepts = _reader(grammar)
    assert [text for text in accepted if not accepts(text)] == []
    assert [text for text in rejected if accepts(text)] == []


_LETTERS = 'ab"é'
_LONGEST = 4
_STRINGS = [
    "".join(letters) for length in range(_LONGEST + 1) for letters in itertools.product(_LETTERS, repeat=length)
]
_CLASSES = {
    "[ab]": "ab",
    '["]': '"',
    '[^"]': "abé",
    r"[^a\n]": 'b"é',
    ".": _LETTERS,
    "[a-é]": "abé",
    "[é]": "é",
    "[^!-z]": "é",
}
_RULES = ("root", "x", "y")
_COUNTS = {"*": (0, 99), "+": (1, 99), "?": (0, 1), "{2}": (2, 2), "{1,3}": (1, 3), "{2,}": (2, 99), "{0}": (0, 0)}


class _Texts:
    """A part of a grammar: how it is written, and which texts of up to four letters it describes, given the rules'."""

    def __init__(self, written: str, texts: Callable[[dict[str, set[str]]], set[str]]) -> None:
        self.written = written
        self.texts = texts

    @classmethod
    def sequence(cls, parts: list[_Texts]) -> _Texts:
        def texts(rules: dict[str, set[str]]) -> set[str]:
            result = {""}
            for part in parts:
                result = _joined(result, part.texts(rules))
            return result

        return cls("(" + " ".join(part.written for part in parts) + ")", texts)

    @classmethod
    def choice(cls, parts: list[_Texts]) -> _Texts:
        written = "(" + " | ".join(part.written for part in parts) + ")"
        return cls(written, lambda rules: set().union(*(part.texts(rules) for part in parts)))

    @classmethod
    def repetition(cls, part: _Texts, count: str) -> _Texts:
        low, high = _COUNTS[count]

        def texts(rules: dict[str, set[str]]) -> set[str]:
            once = part.texts(rules)
            result: set[str] = set()
            current = {""}
            for number in range(min(high, low + _LONGEST) + 1):
                result |= current if number >= low else set()
                current = _joined(current, once)
            return result

        return cls(f"({part.written}){count}", texts)


def _joined(left: set[str], right: set[str]) -> set[str]:
    return {a + b for a in left for b in right if len(a) + len(b) <= _LONGEST}


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


_leaves = st.one_of(
    st.text(_LETTERS, max_size=3).map(lambda text: _Texts(_quoted(text), lambda rules: {text})),
    st.sampled_from(sorted(_CLASSES)).map(lambda name: _Texts(name, lambda rules: set(_CLASSES[name]))),
    st.sampled_from(_RULES).map(lambda name: _Texts(name, lambda rules: rules[name])),
    st.just(_Texts(r'"\"" [^"]* "\""', lambda rules: {f'"{text}"' for text in _STRINGS[:21] if '"' not in text})),
)
_parts = st.recursive(
    _leaves,
    lambda parts: st.one_of(
        st.lists(parts, min_size=2, max_size=4).map(_Texts.sequence),
        st.lists(parts, min_size=2, max_size=3).map(_Texts.choice),
        st.builds(_Texts.repetition, parts, st.sampled_from(sorted(_COUNTS))),
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.fixed_dictionaries(dict.fromkeys(_RULES, _parts)), st.booleans())
def test_random_grammars_describe_the_same_short_texts_as_sets_computed_from_them(
    parts: dict[str, _Texts], regex: bool
) -> None:
    rules: dict[str, set[str]] = {name: set() for name in _RULES}
    while rules != (new := {name: part.texts(rules) for name, part in parts.items()}):
        rules = new
    grammar = "\n".join(f"{name} ::= {part.written}" for name, part in parts.items())
    with pytest.MonkeyPatch.context() as patch:
        if not regex:
            patch.setattr(lark, "_MAX_REGEX", 0)  # so that more grammars are cut into lexemes
        try:
            accepts = _reader(grammar)
        except GrammarError as error:
            why = str(error)
        else:
            why = ""
            assert {text for text in _STRINGS if accepts(text)} == rules["root"]
    assert not why or "never ends" in why


# llama.cpp itself


def _tokenizer(vocab: Vocab) -> LLTokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls llama.cpp by old names
        return lltokenizer_from_vocab(vocab.handle, eos_token=sorted(vocab.ends))


class _Differential:
    """llama.cpp's grammars beside llguidance's, with the same vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._tokenizer = _tokenizer(vocab)
        self._random = np.random.default_rng(7)
        texts = [token for token in range(vocab.size) if token not in vocab.ends and _is_text(vocab.piece(token))]
        self._texts = np.array(texts, np.int32)

    def walk(self, grammar: str, text: str) -> bool:
        """Compare the tokens allowed at each token of a text, up to one that isn't, and tell whether all were."""
        native = NativeSampler(lib.llama_sampler_init_grammar(self._vocab.handle, grammar.encode(), b"root"))
        matcher = _matcher(self._tokenizer, lark.from_gbnf(grammar))
        written = b""
        for token in [*self._vocab.tokenize(text, add_bos=False, parse_special=False), min(self._vocab.ends)]:
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").astype(bool)
            tokens = self._sample(mask, token, whole=not written or _is_text(written))
            logits = np.zeros(len(tokens), np.float32)
            native.apply(tokens, logits)
            differing = tokens[(logits == 0) != mask[tokens]]
            assert [self._vocab.piece(int(other)) for other in differing] == [], f"in {text!r} before token {token}"
            if not mask[token]:
                return False
            if token not in self._vocab.ends:
                written += self._vocab.piece(token)
                native.accept(token)
                assert matcher.consume_token(token), matcher.get_error()
        return True

    def _sample(self, mask: Any, token: int, *, whole: bool) -> Any:
        """Return some tokens, many of them allowed; ends not within a character, where llama.cpp allows them too."""
        allowed = self._texts[mask[self._texts]]
        some = [self._random.choice(tokens, min(150, len(tokens)), replace=False) for tokens in (allowed, self._texts)]
        return np.unique(np.concatenate([*some, [token, *(self._vocab.ends if whole else ())]])).astype(np.int32)


def _is_text(piece: bytes) -> bool:
    """Whether a token is of whole characters: llama.cpp takes broken ones for more than they are."""
    try:
        return bool(piece.decode()) and b"\0" not in piece
    except UnicodeDecodeError:
        return False


@pytest.fixture(scope="module")
def differential(vocab: Vocab) -> _Differential:
    return _Differential(vocab)


@pytest.mark.parametrize(
    ("grammar", "accepted", "rejected"),
    [
        (
            _JSON,
            [
                '{"name": "Alice \\"A\\" Smith", "age": 31, "tags": ["one", "two words", []], "x": {"y": null}}',
                '{"é😀": "日本語 \\u00e9", "number": -12.5e-3,\n\t"list": [1, 20, true]\n}',
                "{}",
            ],
            ['{"a": 1,}', '{"a" 1}', '["a"]', '{"a": "b\n"}', '{"a": 1}}', '{"a": tru}'],
        ),
        (_CHESS, ["1. e4 e5\n2. Nf3 Nc6\n3. Bb5 a6\n", "1. d4 Nf6+\n2. O-O-O exd8=Q#\n"], ["1. e9 e5\n", "1. e4 e5\n"]),
        (_ARITHMETIC, ["1 +2 *(foo -bar_2)= 42\n\n", "x=y\n(a)/b =(c)\n"], ["1 + = 2\n", "(1=2\n", "x = 1"]),
        (_LIST, ["- apples\n- “pears” and 3 figs\n", '- he said "yes, \\please"\n'], ["apples\n", "- \n"]),
        (_CSV, ['a,b,c\n1,"two, and ""three""",\r\n', "\n", ",,\n"], ['a"b,c\n', '"a"b\n']),
        (
            _MARKUP,
            ['<a href="x y">some text, <b>bold</b><br/> and <!-- a comment --> more</a>', "<a/>"],
            ["text", "<a><b</a>", "<a></a", "<a><!-- Comment --></a>"],
        ),
        (
            _CODE,
            ["// a comment / here\nname = (one+(2*three)/'a \"string\"');\n", 'x = "a \\" // b";\n// end\n'],
            ["name = / 2;\n", "/ a\n", "x = (1;\n"],
        ),
        (
            _SCHEMA,
            [
                '{"name": "a", "date": "2024-06-01", "kind":"folder"}',
                '{"name":"","date":"1999-12-31","kind":"file","inside":[{"name":"b","date":"2000-01-01","kind":"file"}]}',
                '{ "name": "", "date": "2024-01-01", "kind": "file",\n  "nature": "of \\u0041 thing"}',
            ],
            ['{"name": "x", "date": "2024-13-01"', '{"date"', '{"name": "a", "date": "2024-06-01", "kind": "fil"}'],
        ),
        (_GREETING, ["こんにちはשלום😀😃", "Grüße、мир", "привет、ёж"], ["Hello", "привет, мир"]),
        (_TAGS, ["{taille: 'très \"grand\" 😀', b: {é: '', ü: {x: 'y'}}}"], ["{}", "{é: {}}", "{ö: ''}"]),
        ('root ::= "yes" | "no" | "maybe" " so"?', ["yes", "maybe so"], ["may", "nope"]),
        ("root ::= .*", ["anything\n\n at all: 😀"], []),
        ('root ::= a a\na ::= [a-z ]+ | "The"', ["some words", "The words", "wordsThe"], ["a", "The The The"]),
    ],
)
def test_allows_the_tokens_that_llama_cpp_allows(
    differential: _Differential, grammar: str, accepted: list[str], rejected: list[str]
) -> None:
    assert [text for text in accepted if not differential.walk(grammar, text)] == []
    assert [text for text in rejected if differential.walk(grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "beginning"), [(_JSON, '{"a": "some'), (_SCHEMA, '{"name": "some'), (_CODE, "x = 'some")]
)
def test_masks_inside_of_strings_are_not_computed_character_by_character(
    vocab: Vocab, grammar: str, beginning: str
) -> None:
    tokenizer = _tokenizer(vocab)

    def seconds() -> float:
        matcher = _matcher(tokenizer, lark.from_gbnf(grammar))
        assert matcher.consume_tokens(vocab.tokenize(beginning, add_bos=False, parse_special=False))
        start = time.thread_time()
        for token in vocab.tokenize(" words in a row", add_bos=False, parse_special=False):
            matcher.compute_bitmask()
            assert matcher.consume_token(token)
        return time.thread_time() - start

    fast = min(seconds() for _ in range(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lark, "_MAX_WORK", 0)  # every lexeme is a character
        slow = min(seconds() for _ in range(5))
    assert fast < slow / 10  # 100 and more in fact


# What is refused


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", 'there is no rule "root"'),
        ("# nothing", 'there is no rule "root"'),
        ('Root ::= "a"', 'there is no rule "root"'),
        ("x ::= root", 'line 1: there is no rule "root"'),
        ('root ::= "a"\n  | item', "line 2: the name of a rule is expected, and not '|'"),
        ('root ::= "a" (\n  "b" | item)', 'line 2: there is no rule "item"'),
        ('root ::= "a"\n\nx ::= item{0}', 'line 3: there is no rule "item"'),
        ('root ::= "a"\r\rx ::= "b"\r\ny ::= item', 'line 4: there is no rule "item"'),
        ('root = "a"', "line 1: \"::=\" is expected, and not '='"),
        ("root", 'line 1: "::=" is expected, and not the end'),
        ('root\n::= "a"', "line 1: \"::=\" is expected, and not '\\n'"),
        ('root ::= "a" "b', "line 1: the string is not closed"),
        ('root ::= "a"\nx ::= "b\n\n', "line 2: the string is not closed"),
        ("root ::= [ab", "line 1: the class is not closed"),
        ("root ::= [a-", "line 1: the class is not closed"),
        ("root ::= [z-a]", "line 1: a range in the class ends before it begins"),
        ("root ::= []", "line 1: the class has no characters"),
        ("root ::= [^]", "line 1: the class has no characters"),
        (r"root ::= [\x00]", "line 1: the class has no characters"),
        (r"root ::= [\uD800-\uDFFF]", "line 1: the class has no characters"),
        (r"root ::= [^\x01-\U0010FFFF]", "line 1: the class has no characters"),
        (r'root ::= "\uD83D\uDE00"', "line 1: U+D83D is no character of text"),
        ('root ::= "a\ud83d"', "line 1: U+D83D is no character of text"),
        (r'root ::= "\x00"', "line 1: U+0000 is no character of text"),
        (r'root ::= "\U00110000"', "line 1: U+110000 is no character of text"),
        (r'root ::= "\d"', r"line 1: \d is no escape, or its digits are missing"),
        (r'root ::= "\xg0"', r"line 1: \x is no escape, or its digits are missing"),
        (r'root ::= "\u12"', r"line 1: \u is no escape, or its digits are missing"),
        ('root ::= "\\', "line 1: \\ is no escape, or its digits are missing"),
        ('root ::= ("a"', 'line 1: ")" for the "(" in line 1 is expected, and not the end'),
        ('root ::= ("a"\nx ::= "b"', 'line 2: ")" for the "(" in line 1 is expected, and not \':\''),
        ('root ::= "a")', "line 1: the end of the line is expected, and not ')'"),
        ('root ::= "a" \ud800', "line 1: the end of the line is expected, and not '\\ud800'"),
        ('root ::= "a" b ::= "c"', "line 1: the end of the line is expected, and not ':'"),
        ("root ::= *", 'line 1: there is nothing that "*" could repeat'),
        ('root ::= "a" | +', 'line 1: there is nothing that "+" could repeat'),
        ("root ::= (?)", 'line 1: there is nothing that "?" could repeat'),
        ("root ::= {2}", 'line 1: there is nothing that "{" could repeat'),
        ('root ::= "a"{}', "line 1: a number is expected, and not '}'"),
        ('root ::= "a"{,2}', "line 1: a number is expected, and not ','"),
        ('root ::= "a"{2', 'line 1: "}" is expected, and not the end'),
        ('root ::= "a"{2,x}', "line 1: a number is expected, and not 'x'"),
        ('root ::= "a"{3,2}', "line 1: the repetition {3,2} ends before it begins"),
        ('root ::= "a"{1000001}', "line 1: a repetition can't be of more than 1000000"),
        ('root ::= "a"{1,' + "9" * 10_000 + "}", "line 1: a repetition can't be of more than 1000000"),
        ('root ::= "a" \0', "line 1: there is a NUL character"),
        (
            'root ::= <think> "a"',
            "line 1: tokens, such as <think> or <[1]>, can't be used in a grammar here; write text",
        ),
        ('root ::= "a"\nx ::= !<[12]>', "line 2: tokens, such as <think> or <[1]>, can't be used in a grammar here; "),
        ('root ::= root "a"', 'line 1: the rule "root" never ends'),
        ("root ::= root", 'line 1: the rule "root" never ends'),
        ('root ::= x root\nx ::= "a"', 'line 1: the rule "root" never ends'),
        ('root ::= "a" | x\nx ::= "b" ("c" x)+', 'line 2: the rule "x" never ends'),
        ('root ::= x?\nx ::= y{2}\ny ::= "b" x', 'line 2: the rule "x" never ends'),
        ('root ::= "' + "a" * (1 << 18), "the grammar is longer than 262144 characters"),
        ("root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, 'line 1: the rule "root" has more than 500 rules and'),
        ('root ::= "a"' + "*" * 50_000, 'line 1: the rule "root" has more than 500 rules and groups in one another'),
        (
            "root ::= r0\n" + "".join(f"r{number} ::= r{number + 1}\n" for number in range(999)) + 'r999 ::= "a"',
            'line 500: the rule "r498" has more than 500 rules and groups in one another',
        ),
        (  # in an order in which they would be visited one by one
            f"root ::= {' '.join(f'r{number}' for number in range(599, -1, -1))}\n"
            + "".join(f"r{number} ::= r{number + 1}\n" for number in range(599))
            + 'r599 ::= "a"',
            'line 101: the rule "r99" has more than 500 rules and groups in one another',
        ),
    ],
)
def test_refuses_what_is_no_grammar_and_says_why_and_where(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as error:
        lark.from_gbnf(grammar)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200
    str(error.value).encode()


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 499 + '"a"' + ")" * 499,
        "root ::= " + "(" * 499 + '"a"' + ' "b"?)*' * 499,
        "root ::= " + "(" * 499 + '"a"' + "){0,3}" * 499,
        "".join(f'r{number} ::= "a" r{number + 1} "b" | "c"\n' for number in range(498)) + 'r498 ::= "d"\nroot ::= r0',
        "".join(f'r{number} ::= "a" r{number + 1}? "b" | "c" root\n' for number in range(498))
        + 'r498 ::= "d"\nroot ::= r0 | "a"',
    ],
)
def test_llguidance_survives_the_deepest_grammars_in_a_thread(grammar: str) -> None:
    masks = []
    written = lark.from_gbnf(grammar)
    thread = threading.Thread(target=lambda: masks.append(_matcher(_byte_tokenizer(), written).compute_bitmask()))
    thread.start()
    thread.join()
    assert masks[0][ord("a") >> 3] >> (ord("a") & 7) & 1


_WORDS = ["".join(letters) for letters in itertools.product("abcdefghijklm", repeat=4)]


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "' + "a" * 100_000 + '"',
        "root ::= [" + "".join(map(chr, range(0x4E00, 0x9F00, 2))) * 6 + "]",
        "root ::= " + " | ".join(map(_quoted, _WORDS[:20_000])),
        _recursive("root ::= " + " ".join(map(_quoted, _WORDS[:10_000]))),
        _recursive("root ::= " + ". " * 30_000),
        _recursive("root ::= " + '[^"]* "a" ' * 10_000),
        _recursive("root ::= r0\n" + "".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(450)) + 'r450 ::= "z"'),
        _recursive('root ::= ((("a"{1000000}){1000000}){1000000}){0,1000000}'),
        _recursive('root ::= (""{1000000}){1000000} "\\"" [^"]{0,1000000} "\\""'),
        _recursive("root ::= " + " | ".join(f'"<" [ab]* "a" [ab]{{{count}}} ">"' for count in range(20, 300))),
        'root ::= "a"\n' * 15_000,
        "root ::= " + "#\n" * 100_000 + '"a"',
    ],
)
def test_large_and_cunning_grammars_take_seconds_at_most(grammar: str) -> None:
    start = time.perf_counter()
    written = lark.from_gbnf(grammar)
    assert time.perf_counter() - start < 8  # at most two in fact
    _matcher(_byte_tokenizer(), written)


@settings(max_examples=300)
@given(st.text('abr "[]()|*+?{}:=\\<>!.#^-0129\n\rxuU\0é', max_size=30))
@example("root ::= ")
def test_any_text_is_a_grammar_or_refused(text: str) -> None:
    for grammar in (text, f"root ::= {text}", f'root ::= "a" {text}\na ::= "b" | b\nb ::= [c]'):
        try:
            written = lark.from_gbnf(grammar)
        except GrammarError:
            continue
        _matcher(_byte_tokenizer(), written)
