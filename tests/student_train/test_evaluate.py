"""Held-out evaluation: exact match counts right answers, the loss is what one computes by hand."""

from pathlib import Path

import pytest
import torch

from shared.checkpoint import ModelFolder
from shared.images import ImageProcessor
from shared.mobilevlm import MobileVLM, load_model
from shared.samples import index_tar, read_sample
from shared.tokenizer import load_tokenizer
from student_train.evaluate import HeldOutSample, HeldOutSet, Scores, encode, passes
from tests.student_train.support import (
    STUDENT,
    aligned,
    gradients_of,
    log_lines,
    recipe,
    train,
    training_set,
)
from tests.support import CLIP, annotation, png, sample, text_sample, write_tar


def held_out(
    *tars: Path, limit: int | None = None, template: str = "v1", max_tokens: int = 2048
) -> HeldOutSet:
    return HeldOutSet(
        tars, template=template, max_tokens=max_tokens, tokenizer=load_tokenizer(STUDENT),
        processor=ImageProcessor(CLIP, "pad"), limit=limit, max_new_tokens=8,
    )  # fmt: skip


def prepared(questions: HeldOutSet, tar: Path) -> list[HeldOutSample]:
    return [questions.prepare(read_sample(tar, entry)) for entry in index_tar(tar).samples]


@pytest.fixture(scope="module")
def model() -> MobileVLM:
    return load_model(ModelFolder(str(STUDENT)), str(CLIP)).eval()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about two images."""
    return write_tar(
        tmp_path_factory.mktemp("two") / "two.tar",
        sample("a", annotation("<image>\nwhat color is the boat", "red boat"), png(1)),
        sample("b", annotation("<image>\nwhere is the sky there", "top left"), png(2)),
    )


def test_a_student_that_learned_two_answers_by_heart_scores_full_marks(
    two: Path, tmp_path: Path
) -> None:
    result = train(
        tmp_path / "run", [two], None, "--eval-data", two, "--json", global_batch=2, micro_batch=2,
        epochs=120, save_every=1000, eval_every=120, log_every=40, max_new_tokens=8,
        optim={"lr": 5e-3, "warmup": 0.1},
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    assert '"exact_match": 1.0' in result.stdout
    lines = [line for line in log_lines(tmp_path / "run") if "eval_exact_match" in line]
    assert [(line["step"], line["eval_exact_match"]) for line in lines] == [(120, 1.0)]
    assert lines[0]["eval_loss"] < 0.1

    trained = load_model(ModelFolder(str(tmp_path / "run" / "export")), str(CLIP)).eval()
    questions = held_out(two)
    assert questions.answers(trained, prepared(questions, two)) == [["red boat"], ["top left"]]

    other = write_tar(
        tmp_path / "other.tar",
        sample("a", annotation("<image>\nwhat color is the boat", "red boat"), png(1)),
        sample("b", annotation("<image>\nwhere is the sky there", "bottom right"), png(2)),
    )
    scores = held_out(other).score(trained)
    assert (scores.right, scores.answers, scores.exact_match) == (1, 2, 0.5)


def test_an_untrained_student_scores_nothing(two: Path, model: MobileVLM) -> None:
    scores = held_out(two).score(model)

    assert (scores.right, scores.answers, scores.exact_match) == (0, 2, 0.0)


def test_the_loss_is_the_mean_over_response_positions_computed_one_by_one(
    tars: list[Path], model: MobileVLM
) -> None:
    questions = held_out(tars[0])
    nats, positions = 0.0, 0
    for one in prepared(questions, tars[0]):
        ids = one.prompt.input_ids.tolist()
        table = model.llm.get_input_embeddings()
        with torch.no_grad():
            embedded = table(torch.tensor([max(i, 0) for i in ids]))
            labels = one.prompt.labels.tolist()
            if one.pixels is not None:
                at = ids.index(-200)
                vision = model.encode_images(one.pixels[None])[0]
                embedded = torch.cat([embedded[:at], vision, embedded[at + 1 :]])
                labels = [*labels[:at], *[-100] * 144, *labels[at + 1 :]]
            logits = model.llm(inputs_embeds=embedded[None]).logits[0]
        for position, label in enumerate(labels[1:]):
            if label != -100:
                nats -= float(logits[position].log_softmax(-1)[label])
                positions += 1

    scores = questions.score(model)

    assert scores.positions == positions
    assert scores.loss == pytest.approx(nats / positions, rel=1e-5)


def test_held_out_loss_and_training_loss_of_the_same_samples_agree(
    tars: list[Path], model: MobileVLM
) -> None:
    samples = training_set(tars[:1], recipe(), None)
    terms, _ = gradients_of(aligned(recipe(), None), [samples[list(range(14))]], recipe())

    assert held_out(tars[0]).score(model).loss == pytest.approx(terms["sup"], rel=1e-5)


def test_greedy_answers_of_a_padded_batch_are_those_given_one_by_one(
    tars: list[Path], model: MobileVLM
) -> None:
    questions = held_out(tars[0])
    samples = prepared(questions, tars[0])
    assert len({len(one.prompt.input_ids) for one in samples}) > 4

    together = questions.answers(model, samples)
    alone = [questions.answers(model, [one])[0] for one in samples]

    assert together == alone
    assert any(answer for answers in together for answer in answers)
    assert {len(answers) for answers in together} == {1, 2}  # every question of a conversation


def test_greedy_answers_are_the_likeliest_tokens_one_after_another(
    tars: list[Path], model: MobileVLM
) -> None:
    questions = held_out(tars[0])
    one = prepared(questions, tars[0])[0]
    tokenizer = load_tokenizer(STUDENT)
    from shared.prompt import question_ids
    from shared.sequence import splice

    ids = question_ids(one.conversation.turns[:1], tokenizer)
    (vision,) = encode(model, [one])
    said: list[int] = []
    with torch.no_grad():
        for _ in range(8):
            embedded = splice(model.llm.get_input_embeddings(), [*ids, *said], vision)
            said.append(int(model.llm(inputs_embeds=embedded[None]).logits[0, -1].argmax()))
    assert 2 not in said

    assert model.generate([ids], [vision], max_new_tokens=8) == [said]


def test_evaluation_leaves_the_model_as_it_was(two: Path, model: MobileVLM) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    held_out(two).score(model)

    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    model.eval()


def test_shares_of_several_processes_add_up_to_the_whole(
    tars: list[Path], model: MobileVLM
) -> None:
    questions = held_out(*tars)
    whole = questions.score(model)

    shares = [questions.score(model, rank=rank, world=3) for rank in range(3)]
    total = shares[0] + shares[1] + shares[2]

    assert (total.positions, total.right, total.answers) == (
        whole.positions, whole.right, whole.answers,
    )  # fmt: skip
    assert total.loss == pytest.approx(whole.loss, rel=1e-5)


def test_samples_that_cannot_be_used_are_counted_and_named(
    model: MobileVLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        sample("broken", image=b"not an image"),
        text_sample("fine"),
        sample("odd", annotation("what", "")),
    )

    scores = held_out(tar).score(model)

    assert (scores.answers, scores.skipped) == (1, 2)
    assert "skipped=broken" in caplog.text
    assert "skipped=odd" in caplog.text


def test_template_plain_has_a_loss_but_asks_nothing(model: MobileVLM, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a", annotation("<image>", "a red boat")))

    scores = held_out(tar, template="plain").score(model)

    assert scores.positions > 0
    assert scores.exact_match is None


def test_scores_of_nothing_have_no_rate() -> None:
    assert Scores().exact_match is None
    assert Scores().loss == 0


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        ([], []),
        ([3], [(0, 1)]),
        ([50, 3, 3], [(0, 1), (1, 3)]),  # one that is too long alone goes alone
        ([2, 2, 2, 2, 2, 2], [(0, 5), (5, 6)]),
        ([1, 1, 1, 9, 1, 1], [(0, 3), (3, 4), (4, 6)]),
    ],
)
def test_a_pass_holds_as_many_padded_tokens_as_it_may(
    sizes: list[int], slices: list[tuple[int, int]]
) -> None:
    assert list(passes(sizes, 10)) == [slice(*bounds) for bounds in slices]


def test_scores_do_not_depend_on_how_much_goes_through_the_model_at_once(
    tars: list[Path], model: MobileVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = held_out(tars[0])
    samples = prepared(questions, tars[0])
    together, answers = questions.score(model), questions.answers(model, samples)

    monkeypatch.setattr("student_train.evaluate._MOST_TOKENS", 600)

    apart = questions.score(model)
    assert questions.answers(model, samples) == answers
    assert (apart.positions, apart.answers) == (together.positions, together.answers)
    assert apart.loss == pytest.approx(together.loss, rel=1e-5)


def test_a_limit_takes_samples_evenly_from_all_tars(tars: list[Path]) -> None:
    every = [entry.key for tar in tars for entry in index_tar(tar).samples]

    found = held_out(*tars, limit=5)

    assert [entry.key for _, entry in found._entries] == [
        every[round(place * (len(every) - 1) / 4)] for place in range(5)
    ]
    assert len(held_out(*tars, limit=10**6)) == len(every)


def test_samples_that_the_headers_rule_out_are_counted_once(
    tmp_path: Path, model: MobileVLM
) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        sample("a", annotation("<image>\nwhat color is the boat", "red boat"), png(1)),
        [("b.png", png(2))], [("c.png", png(3))],
    )  # fmt: skip
    found = held_out(tar)

    assert [found.score(model, rank=rank, world=2).skipped for rank in (0, 1)] == [2, 0]


def test_an_answer_counts_if_it_is_the_whole_true_one_spaces_around_it_aside(
    model: MobileVLM, tmp_path: Path
) -> None:
    def tar_of(answer: str) -> Path:
        note = annotation("<image>\nwhat color is the boat", answer)
        return write_tar(tmp_path / "t.tar", sample("a", note, png(1)))

    tar = tar_of("red")
    ((said,),) = held_out(tar).answers(model, prepared(held_out(tar), tar))
    first, *_, _last = said.split()

    for truth, right in ((said, 1), (f" {said} ", 1), (f"{said} red", 0), (first, 0)):
        assert held_out(tar_of(truth)).score(model).right == right, truth


def test_held_out_samples_that_are_longer_than_training_allows_are_skipped(
    model: MobileVLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("long"), text_sample("short"))

    scores = held_out(tar, max_tokens=144).score(model)

    assert (scores.answers, scores.skipped) == (1, 1)
    assert "skipped=long" in caplog.text
