r"""Recognize sentences that deny the value in them: `it is not going to be 5`, `a common mistake is 5`, `5 (ignore)`.

A list of words cannot know every way to deny a value. A policy gains nothing from the ways that are missing here: it
must name the right value, and only that one counts. Other values next to it are found by alternatives.py.
Asserted by tests/unit/rewards/final_answers/test_denials.py.
"""

from __future__ import annotations

import re

_END = r"[\s$*:({\[]*\Z"
_NEGATED = re.compile(
    r"(?:\b(?:not|never|cannot)\b|n't\b)[^\w\\]*"
    r"(?:(?:going|supposed|likely|expected|able|meant|equal|exactly|even|really|actually|truly|be|been|to|the|same|as|an?)"
    r"\b[^\w\\]*){1,6}\Z",
    re.IGNORECASE,
)
_MISTAKE = r"(?:mistake|error|trap|pitfall|misconception|misreading|miscalculation|distractor|decoy|fallacy)"
_USUAL = r"(?:usual|common|typical|frequent|classic)"
_REJECTED = r"(?:rejected|invalid|excluded|deleted?|ignored?|disregard|discard(?:ed)?|refuted|disproved|withdrawn)"
_OPERATION_OF = (
    r"(?:twice|thrice|half|double|triple"
    r"|(?:square|cube|root|negative|opposite|reciprocal|inverse|half|double|third) of)"
)
_OPERATION_BEHIND = r"(?:plus|minus|times|divided|multiplied|squared|cubed|doubled|halved|increased|reduced)"
_BOUND = r"(?:upper bound|lower bound|bound|guess|estimate|approximation)"
_FOOLISH = r"(?:foolish|silly|false|absurd|naive|stupid|unwise|premature)"
_CALLED_WRONG_BEFORE = re.compile(
    rf"\b(?:an?|the|one|{_USUAL})\s+(?:[a-z]+\s+){{0,2}}?{_MISTAKE}\s+(?:is|are|was|would be)\b[^.,;\n]*\Z"
    rf"|\b{_USUAL}\s+{_MISTAKE}\s+(?:gives|yields|leads to|results in)\b[^.,;\n]*\Z"
    rf"|(?:\A|[.!?\n]\s*){_REJECTED}(?:\s+(?:this|that|it))?\s*:[\s$*]*\Z"
    rf"|\b{_FOOLISH} to \w+(?: that)?{_END}|\b(?:unequal to|I made){_END}"
    rf"|\b{_OPERATION_OF}\s+(?:the\s+)?(?:[a-z]+\s+)?(?:answer|result|solution)\b[^.,;\n]{{0,20}}\Z"
    rf"|\b(?:answer|result|solution)\s+{_OPERATION_BEHIND}\b[^.,;\n]{{0,40}}\Z"
    rf"|\bmore than (?:the|my) answer\W*\Z|\b(?:digits?|sum|product|factors?|multiple) of the answer is{_END}"
    rf"|\ban?\s+(?:[a-z]+\s+)?{_BOUND}\s+(?:\w+\s+){{0,4}}(?:is|of|would be){_END}",
    re.IGNORECASE,
)
_WRONG = (
    r"(?:refuted|disproved|rejected|excluded|ignored?|nonsense|fake|fabricated|bogus|made up|miscalculat\w+|doubt"
    r"|erroneous|invalid|untrue|unverified|discarded|retracted|withdrawn|deleted|unfounded|absurd|inconsistent|incompatible"
    r"|inaccurate|inexact|unacceptable|unreasonable|infeasible|unfeasible|impossible|implausible|improbable|inadmissible"
    r"|spurious|extraneous|contradict\w*|violat\w+|conflicts?|fails?|cannot|can not|can't"
    r"|(?:does|did|do|could|would)(?: not|n't)|approx(?:imately)?(?=\W*(?:\Z|\n))"
    r"|(?:my|our|the|an?) (?:first|initial|tentative|preliminary|rough) (?:try|attempt|guess|idea|thought))"
)
_CALLED_WRONG_BEHIND = re.compile(
    r"[\s,($\u2013-]*(?:(?:is|was|are|has|have|had|been|got|gets|turned out|to be|should|must|will|be|proved|which|that"
    rf"|I|it|an?|the)\s+)*(?:[a-z]+ly\s+)?{_WRONG}\b",
    re.IGNORECASE,
)


def is_negated_before(before: str) -> bool:
    """Return True if a text ends in a negation with only auxiliary words behind it: `is not going to be `."""
    return _NEGATED.search(before) is not None


def is_called_wrong_before(sentence: str) -> bool:
    """Return True if the sentence before a value calls it a mistake, a bound, or an operation on the answer."""
    return _CALLED_WRONG_BEFORE.search(sentence) is not None


def is_called_wrong_behind(behind: str) -> bool:
    """Return True if the first thing that the text behind a value says is that it is wrong: `5 (ignore)`."""
    return _CALLED_WRONG_BEHIND.match(behind) is not None
