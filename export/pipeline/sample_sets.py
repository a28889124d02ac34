"""The calibration samples and parity cases of a build: drawn and encoded once, whoever asks what they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import ArrieroError
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, Samples
from arriero.export.calibration.estimate import Size, embedded_size
from arriero.export.samples.cases import draw_cases, encoded_sizes, shortening
from arriero.graphs.config import ModelConfig
from arriero.runtimes.proof.cases import MAX_ANSWER_TOKENS

if TYPE_CHECKING:
    from arriero.runtimes.processor.processor import Processor
    from arriero.runtimes.proof.parity_case import ParityCase


class SampleSets:
    """Both sets of one build; `seen` is the model as far as its modalities need it, `folder` that of its tokenizer."""

    def __init__(self, build: BuildConfig, seen: ModelConfig, folder: Path) -> None:
        self._build, self._seen, self._folder = build, seen, folder
        self._sizes: dict[tuple[bool, int], list[Size]] = {}

    @cached_property
    def processor(self) -> Processor:
        """The checkpoint's processor. Raises ArrieroError for one that cannot be read."""
        # Imported here: an unchanged build never gets this far, and torch takes a second to import.
        from arriero.export.build_file.model_spec import model_spec
        from arriero.runtimes.processor.processor import Processor

        return Processor(self._folder, model_spec(self._seen))

    @cached_property
    def samples(self) -> list[ParityCase]:
        """The calibration samples."""
        return draw_cases(self._build.calibration, self._build.modalities)

    @cached_property
    def cases(self) -> list[ParityCase]:
        """The parity cases."""
        return draw_cases(self._build.parity.cases, self._build.modalities)

    def sample_sizes(self) -> list[Size]:
        """Tokens and image tiles of each calibration sample. Raises Problems for those that cannot be read."""
        return self._encoded(False, self._seen.text.max_positions)

    def case_sizes(self, context: int) -> list[Size]:
        """The same of each parity case, which is to leave room for one token of an answer in `context`."""
        return self._encoded(True, context - 1)

    def answered(self) -> int:
        """The tokens of all generated answers, roughly: a token for three characters of what is expected, and one."""
        unknown = MAX_ANSWER_TOKENS // 2  # most end early
        return sum(len(case.answer) // 3 + 2 if case.answer else unknown for case in self.cases)

    def planned_sizes(self, state: Mapping[str, bool]) -> tuple[list[Size], list[Size]]:
        """The sizes of the samples and of the cases whose stages are still to be done, by `state`; none of others.

        Raises as the two above for sets from files; of embedded ones, which are a fault of the checkpoint's tokenizer
        and told as such by `check_ready`, an upper bound is given.
        """
        build, sizes, case_sizes = self._build, list[Size](), list[Size]()
        if not state.get("calibrate", True):
            sizes = self._or_bound(build.calibration, self.sample_sizes)
        contexts = [target.context for target in build.targets if not state[f"parity-{target.name}"]]
        if contexts:
            case_sizes = self._or_bound(build.parity.cases, lambda: self.case_sizes(min(contexts)))
        return sizes, case_sizes

    def _or_bound(self, samples: Samples, encode: Callable[[], list[Size]]) -> list[Size]:
        try:
            return encode()
        except ArrieroError:
            if samples.set != EMBEDDED:
                raise
            return [embedded_size(self._seen.vision)] * (samples.samples or 0)

    def _encoded(self, are_cases: bool, most: int) -> list[Size]:
        if (are_cases, most) not in self._sizes:
            chosen = self.cases if are_cases else self.samples
            remedy = shortening(self._build.parity.cases if are_cases else self._build.calibration)
            self._sizes[are_cases, most] = encoded_sizes(chosen, self.processor, most, remedy)
        return self._sizes[are_cases, most]
