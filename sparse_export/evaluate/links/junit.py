"""A gate as JUnit XML, which every pipeline can show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from sparse_export.evaluate.links.chain import LinkResult

__all__ = ["junit_xml"]

_FINDINGS = ("GateFailed", "SpeedupNotReached")  # a test that failed; anything else kept it from being made
# Everything that XML 1.0 cannot hold (section 2.2, Char), like odd bytes of a file name.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(bundle: str, links: Sequence[LinkResult], created: str) -> bytes:
    """One test suite with a test case for each link.

    A finding, like a lower score, is a `failure`; a file that is not what it should be, or something that
    this machine lacks, an `error`. What was not run, or had nothing to check, is `skipped` with the reason.
    """
    suite = ElementTree.Element("testsuite", name="sparse-export gate", timestamp=created.partition("+")[0])
    counts = dict.fromkeys(("failures", "errors", "skipped"), 0)
    for link in links:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_clean(bundle),
            name=f"{link.name}: {link.asks}",
            time=f"{link.duration_s:.3f}",
        )
        if link.figures:
            properties = ElementTree.SubElement(case, "properties")
            for name, value in link.figures.items():
                ElementTree.SubElement(properties, "property", name=name, value=_clean(str(value)))
        if link.outcome == "broken":
            kind = "failure" if link.error in _FINDINGS else "error"
            counts[f"{kind}s"] += 1
            reason = _clean(link.reason or "")
            ElementTree.SubElement(case, kind, message=reason, type=link.error or "").text = reason
        elif link.outcome != "kept":
            counts["skipped"] += 1
            why = "; ".join(link.told) if link.told else "a link before it is broken"
            ElementTree.SubElement(case, "skipped", message=_clean(f"{link.outcome}: {why}"))
        if link.told:
            ElementTree.SubElement(case, "system-out").text = _clean("\n".join(link.told))
    total = {
        "tests": str(len(links)),
        **{name: str(n) for name, n in counts.items()},
        "time": f"{sum(link.duration_s for link in links):.3f}",
    }
    for name, text in total.items():
        suite.set(name, text)
    whole = ElementTree.Element("testsuites", total)
    whole.append(suite)
    ElementTree.indent(whole)
    written: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return written + b"\n"


def _clean(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
