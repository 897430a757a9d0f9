"""The character and byte tokenizers of the tiny models."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo_mega.data.arithmetic import ALPHABET
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer

UNICODE = "naïve café 東京 🙂 \n\t\r\x00 ​ a , . don't  two  blanks ﬁ Å"


def _random_text(rng: random.Random) -> str:
    points = [rng.randrange(0x110000) for _ in range(40)]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def test_byte_tokenizer_decodes_to_the_same_text() -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(0)
    for text in [UNICODE, *(_random_text(rng) for _ in range(200))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_gives_byte_b_the_id_b_plus_two() -> None:
    tokenizer = byte_tokenizer()
    text = UNICODE + "".join(chr(p) for p in range(256))
    assert tokenizer.encode(text) == [byte + 2 for byte in text.encode()]
    assert len(tokenizer) == 258
    # Bytes that no UTF-8 text contains have a token too.
    assert len({tokenizer.convert_ids_to_tokens(i) for i in range(258)}) == 258


def test_char_tokenizer_has_one_token_per_character_and_decodes_to_the_same_text() -> None:
    tokenizer = char_tokenizer(ALPHABET)
    assert tokenizer.encode("07+ 9=") == [2, 9, 12, 14, 11, 13]
    assert tokenizer.decode([2, 9, 12, 14, 11, 13]) == "07+ 9="
    assert len(tokenizer) == len(ALPHABET) + 2


def test_char_tokenizer_encodes_newlines() -> None:
    tokenizer = char_tokenizer("a\nb")
    assert tokenizer.decode(tokenizer.encode("a\n\nb")) == "a\n\nb"


def test_char_tokenizer_rejects_characters_outside_its_alphabet() -> None:
    with pytest.raises(Exception, match="UNK"):
        char_tokenizer("ab").encode("abc")


def test_char_tokenizer_rejects_a_repeated_character() -> None:
    with pytest.raises(ValueError, match="repeats"):
        char_tokenizer("aba")


@pytest.mark.parametrize(("tokenizer", "text"), [(char_tokenizer(ALPHABET), "1+2= 3"), (byte_tokenizer(), UNICODE)])
def test_saved_tokenizer_loads_as_the_same_one(tokenizer: PreTrainedTokenizerBase, text: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')  # must not steer the choice of class
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    assert loaded.decode([*loaded.encode(text), 1, 0], skip_special_tokens=True) == text


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert 1 not in tokenizer.encode("<eos>")
        assert tokenizer.decode(tokenizer.encode("<eos><pad>")) == "<eos><pad>"
