"""The model on its devices, a step at a time: plans in, ids out. Knows plans, slots and devices; decides nothing.

One process stages a plan and executes it; of several, one stages, and all execute what it staged.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int32, UInt32

from gptoss_jax.engine.adapters import check_names
from gptoss_jax.engine.limits import Limits, Program
from gptoss_jax.engine.programs import Drawn, Programs, num_places, unpack
from gptoss_jax.engine.request import SamplingParams, Token
from gptoss_jax.engine.sampling import RowSettings
from gptoss_jax.engine.sequence import Piece, Plan
from gptoss_jax.engine.sequence import Sequence as Scheduled
from gptoss_jax.engine.staging import Staging
from gptoss_jax.errors import UserError
from gptoss_jax.model.transformer import GptOss

_NOTHING = SamplingParams(temperature=0)  # greedy costs least


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a step gave for one piece: ids that its draft had right and the one after them; none if none was wanted.

    Attributes:
        logprobs: of each id.
        top: of each id the best ids in its place with their logprobs, as many as its request wants.
        is_broken: its scores are no numbers, and so there are no ids.
        scores: of the prompt's ids behind those that the piece fed, where they are wanted.
    """

    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top: Sequence[tuple[tuple[int, float], ...]] = ()
    is_broken: bool = False
    scores: Sequence[Token] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The ids of a sequence that came to its slot and whose sampling asks what was said before."""

    slot: int
    ids: Int32[np.ndarray, " T"]
    num_prompt: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """All that a step needs from the host, in plain arrays.

    Attributes:
        program: one of the limits'.
        words: see staging.py.
        settings: of all slots; None if they are those of the step before.
        histories: of slots that are new.
        is_masked: some places are constrained; which ids may come is said while the step runs.
    """

    program: Program
    words: Int32[np.ndarray, " words"]
    settings: RowSettings | None = None
    histories: tuple[History, ...] = ()
    is_masked: bool = False


class Runner:
    """Owns the pages, and what each slot's sequence wants.

    Args:
        model: on one device or a mesh.
        limits: sizes, and the steps that are compiled.
        kv_dtype: of keys and values; None is the model's, int8 halves bfloat16.

    Raises:
        UserError: the mesh cuts the rows, keys and values cannot have that dtype, or the limits name other adapters
            than the model has.
    """

    def __init__(self, model: GptOss, limits: Limits, *, kv_dtype: DTypeLike | None = None):
        _check_mesh(model)
        check_names(limits.adapters, model)
        self._limits = limits
        self._programs = Programs(model, limits, kv_dtype=_check_dtype(kv_dtype, model))
        self._staging = Staging(limits)
        self._mask_words = -(-model.num_scores // 32)
        self._settings = RowSettings.of([_NOTHING] * (limits.max_rows + 1))
        self._sampling = [_NOTHING] * limits.max_rows
        self._histories: list[History] = []
        self._has_new_settings = True
        self._settings_there = self._programs.put(self._settings)
        self._state = self._programs.empty_state()

    @property
    def num_programs(self) -> int:
        """Compiled so far; after `warm_up` it stays."""
        return self._programs.num_compiled

    def warm_up(self) -> None:
        """Compiles every declared program and runs it once, with no sequence in it."""
        for program in self._limits.programs:
            self._programs.compile(program)
            self.execute(StepInput(program=program, words=np.zeros_like(self._staging.words(program))))

    def admit(self, sequence: Scheduled, sampling: SamplingParams) -> None:
        """The sequence has come to its slot; what was there is forgotten."""
        slot = sequence.slot
        assert slot is not None, sequence
        self._staging.admit(slot)
        if sequence.prompt_logprobs:
            sampling = dataclasses.replace(sampling, logprobs=max(sequence.prompt_logprobs, sampling.logprobs or 0))
        self._set(slot, sampling)
        if sampling.penalises:
            ids = np.array(sequence.ids, np.int32)
            self._histories.append(History(slot=slot, ids=ids, num_prompt=sequence.num_prompt))

    def retire(self, slot: int) -> None:
        """Its sequence has ended. No plan names the slot before another one is admitted to it."""
        self._histories = [history for history in self._histories if history.slot != slot]

    def run(self, plan: Plan, *, allowed: Mapping[int, UInt32[np.ndarray, " masks"]] | None = None) -> list[Result]:
        """A result for each piece, those of the decode part first.

        Args:
            allowed: by slot which ids may come next, as bits; slots that are not named are free.
        """
        step = self.stage(plan, is_masked=bool(allowed))
        return self.results(plan, self.execute(step, lambda: self.masks(plan, allowed or {})))

    def stage(self, plan: Plan, *, is_masked: bool = False) -> StepInput:
        """What `execute` needs, here or in other processes; it holds until the next call."""
        settings = self._settings if self._has_new_settings else None
        histories, self._histories = tuple(self._histories), []
        self._has_new_settings = False
        return StepInput(
            program=plan.program,
            words=self._staging.stage(plan, is_masked=is_masked),
            settings=settings,
            histories=histories,
            is_masked=is_masked,
        )

    def masks(self, plan: Plan, allowed: Mapping[int, np.ndarray]) -> np.ndarray:
        """Of each place of a plan; slots that are not named are free."""
        masks = np.full((num_places(plan.program), self._mask_words), 0xFFFFFFFF, np.uint32)
        for place, piece in _pieces(plan):
            mask = allowed.get(piece.sequence.slot) if piece.sequence.slot is not None else None
            if mask is not None:
                assert not piece.draft, "what may come after a draft depends on the draft"
                masks[place, : len(mask)] = mask
        return masks

    def execute(self, step: StepInput, masks: Callable[[], UInt32[np.ndarray, "R masks"]] | None = None) -> Drawn:
        """Runs the program, and waits for what it sampled in each place.

        Args:
            step: from `stage`.
            masks: is asked while the devices compute; of each place the ids that may come, as bits.
        """
        if step.settings is not None:
            self._settings_there = self._programs.put(step.settings)
        for history in step.histories:
            self._state = self._programs.remember(self._state, history.slot, history.ids, num_prompt=history.num_prompt)
        results, scores, places, self._state = self._programs.step(
            step.program, self._state, self._settings_there, step.words
        )
        if step.is_masked:
            assert masks is not None, step
            results, self._state = self._programs.draw(places, self._state, self._settings_there, masks())
        return unpack(np.asarray(results), scores)

    def results(self, plan: Plan, drawn: Drawn) -> list[Result]:
        """What was sampled, by piece."""
        ids, logprobs = drawn.ids.tolist(), drawn.logprobs.tolist()
        scores = self._prompt_scores(plan, drawn)
        found = []
        for place, piece in _pieces(plan):
            scored = scores.get(piece.sequence.id)
            if not piece.samples:
                found.append(Result(scores=scored))
                continue
            end = place + 1
            for guess in piece.draft:
                if ids[end - 1] != guess:
                    break
                end += 1
            if min(ids[place:end]) < 0:
                found.append(Result(is_broken=True, scores=scored))
                continue
            top = [self._top(piece, drawn, i) for i in range(place, end)]
            found.append(Result(ids[place:end], logprobs[place:end], top, scores=scored))
        return found

    def reset(self) -> None:
        """Empty pages, after a step that raised: it may have consumed those that were there. Slots too."""
        self._state = self._programs.empty_state()
        self._histories = []
        self._has_new_settings = True

    def _set(self, slot: int, sampling: SamplingParams) -> None:
        if sampling == self._sampling[slot]:
            return

        def put(rows: np.ndarray, row: np.ndarray) -> None:
            rows[slot] = row[0]

        jax.tree.map(put, self._settings, RowSettings.of([sampling]))
        self._sampling[slot] = sampling
        self._has_new_settings = True

    def _prompt_scores(self, plan: Plan, drawn: Drawn) -> dict[int, list[Token]]:
        """By sequence, for those whose prompt is scored."""
        rows = [(row, piece) for row, piece in enumerate(plan.prefill) if piece.sequence.prompt_logprobs is not None]
        if not rows:
            return {}
        told = drawn.prompt_scores()
        return {
            piece.sequence.id: told.tokens(
                row * plan.program.prefill_width, piece.scored, num_top=piece.sequence.prompt_logprobs or 0
            )
            for row, piece in rows
        }

    def _top(self, piece: Piece, drawn: Drawn, place: int) -> tuple[tuple[int, float], ...]:
        slot = piece.sequence.slot
        number = self._sampling[slot].logprobs if slot is not None else None
        if not number:
            return ()
        best = zip(drawn.top_ids[place, :number].tolist(), drawn.top_logprobs[place, :number].tolist(), strict=True)
        return tuple((token_id, logprob) for token_id, logprob in best if token_id >= 0)


def _pieces(plan: Plan) -> list[tuple[int, Piece]]:
    """Each piece with the first place in which an id of it is wanted."""
    program = plan.program
    width = program.decode_width
    found = [(row * width + piece.count - 1 - len(piece.draft), piece) for row, piece in enumerate(plan.decode)]
    behind = program.decode_rows * width
    return found + [(behind + row, piece) for row, piece in enumerate(plan.prefill)]


def _check_mesh(model: GptOss) -> None:
    if model.mesh is not None and model.mesh.shape["data"] > 1:
        data = model.mesh.shape["data"]
        raise UserError(
            f"mesh axis data={data} cuts rows, and the engine shares pages among all rows, so that each shard would "
            f"need all of them: give the engine a mesh with data=1, and run {data} engines for {data} replicas"
        )


def _check_dtype(kv_dtype: DTypeLike | None, model: GptOss) -> DTypeLike:
    if kv_dtype is None or jnp.dtype(kv_dtype) == model.dtype:
        return model.dtype
    if jnp.dtype(kv_dtype) != jnp.int8:
        raise UserError(f"kv_dtype is {jnp.dtype(kv_dtype)}; expected None ({model.dtype}, as the model) or int8")
    return jnp.int8
