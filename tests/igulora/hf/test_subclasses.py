"""Subclasses of the Trainer with the mixin before them: TRL's, sentence-transformers', and one with habits of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import igulora
from igulora.trainer import IGUTrainer, IGUTrainerMixin

transformers = pytest.importorskip("transformers")


class NotingTrainer(transformers.Trainer):
    """Takes its inputs apart, notes figures per pass, wraps the step: what SFTTrainer and its kin do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[int]] = {"train": [], "eval": []}
        self.inside = False

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.inside = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.inside = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        self._metrics["train" if self.model.training else "eval"].append(labels.shape[0])
        outputs = model(**inputs, use_cache=False)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        loss = total / (num_items_in_batch if num_items_in_batch is not None else targets.ne(-100).sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "passes": float(len(self._metrics["train"]))}, start_time)


class BeforeIt(IGUTrainerMixin, NotingTrainer):
    """The mixin before a class with a loss of its own."""


class AfterIt(IGUTrainer):
    """A loss of its own, before the mixin, and no super()."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return total / num_items_in_batch


@pytest.mark.parametrize("path_pass", ["mixed", "separate"])
def test_a_subclass_before_or_after_the_mixin(llama, rows, arguments, config, state_of, assert_same, path_pass) -> None:
    states = []
    args = arguments(gradient_accumulation_steps=2, logging_steps=5)
    for kind in (BeforeIt, AfterIt, IGUTrainer):
        model = igulora.adapt(llama(), config(path_pass=path_pass))
        trainer = kind(model=model, args=args, train_dataset=rows())
        trainer.train()
        states.append(state_of(trainer))
        if kind is BeforeIt:
            assert trainer._metrics["eval"] == []  # looks at the loss leave no trace
            assert len(trainer._metrics["train"]) == 40
            entry = next(e for e in trainer.state.log_history if "loss" in e)
            assert {"passes", "igu/live"} <= set(entry)
    for other in states[1:]:
        assert_same(states[0], other, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_flattened_sequences_run_in_passes_of_their_own(llama, rows, arguments, config) -> None:
    """Packing without padding: a batch is one row, to which no path row can be added."""
    data = [{"input_ids": r["input_ids"].tolist(), "labels": r["labels"].tolist()} for r in rows()]
    collator = transformers.DataCollatorWithFlattening()
    for flash in (False, True):
        collator.return_flash_attn_kwargs = flash
        trainer = IGUTrainer(
            model=igulora.adapt(llama(), config(path_pass="mixed")), args=arguments(), train_dataset=data,
            data_collator=collator,
        )  # fmt: skip
        with pytest.raises(ValueError, match='flattened into one row .*path_pass="separate"'):
            trainer.train()
    collator.return_flash_attn_kwargs = False
    trainer = IGUTrainer(
        model=igulora.adapt(llama(), config(path_pass="separate")), args=arguments(), train_dataset=data,
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    assert sum(trainer.igu_controller.live_ranks().values()) == 14


# -- sentence-transformers ------------------------------------------------------------------------------------------------


@pytest.fixture
def sentences(tmp_path: Path):
    """``sentences()``: a tiny sentence encoder; its words are w0 to w35."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "bert"
    words = ["<pad>", "<unk>", "[CLS]", "[SEP]", *(f"w{i}" for i in range(36))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip
    shape = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(shape).save_pretrained(folder)

    def make() -> Any:
        modules = sentence_transformers.sentence_transformer.modules
        return sentence_transformers.SentenceTransformer(
            modules=[modules.Transformer(str(folder)), modules.Pooling(16)], device="cpu"
        )

    return make


def texts(count: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(f"w{i}" for i in torch.randint(36, (6,), generator=g).tolist()) for _ in range(count)]


@pytest.fixture
def encoder_run(sentences, config, tmp_path):
    """``encoder_run(loss, options, **arguments)``: a sentence encoder's trainer with the mixin, or without it."""
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")

    class IGUSentences(IGUTrainerMixin, st.SentenceTransformerTrainer):
        pass

    def make(loss: str, options: dict[str, Any], mixin: bool = True, **changes: Any) -> Any:
        columns: dict[str, Any] = {"one": texts(37, 1), "two": texts(37, 2)}
        if loss == "CosineSimilarityLoss":
            columns["score"] = [i % 5 / 4 for i in range(37)]
        if loss == "SoftmaxLoss":
            columns["label"] = [i % 3 for i in range(37)]
        model = sentences()
        igulora.adapt(model, config(**options))
        args = st.SentenceTransformerTrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"), "max_steps": 20, "per_device_train_batch_size": 4,
                "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
                "learning_rate": 1e-3, "dataloader_pin_memory": False, **changes,
            }
        )  # fmt: skip
        extra = [model, 16, 3] if loss == "SoftmaxLoss" else [model]
        objective = getattr(st.sentence_transformer.losses, loss)(*extra)
        kind = IGUSentences if mixin else st.SentenceTransformerTrainer
        return kind(model=model, args=args, train_dataset=datasets.Dataset.from_dict(columns), loss=objective)

    return make


QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class TestSentenceTransformers:
    pytestmark = QUIET

    @pytest.mark.parametrize(
        ("loss", "path_pass"),
        [("CosineSimilarityLoss", "mixed"), ("CosineSimilarityLoss", "separate"),
         ("MultipleNegativesRankingLoss", "separate"), ("SoftmaxLoss", "separate")],
    )  # fmt: skip
    def test_the_budget_is_met(self, encoder_run, loss, path_pass) -> None:
        trainer = encoder_run(loss, {"path_pass": path_pass})
        trainer.train()
        controller = trainer.igu_controller
        assert sum(controller.live_ranks().values()) == controller.budget == 2 * len(controller.bank.names)

    @pytest.mark.parametrize(
        ("loss", "match"),
        [
            ("MultipleNegativesRankingLoss", "couples the rows"),
            ("SoftmaxLoss", "got also parameters outside the model"),
        ],
    )
    def test_mixed_batches_are_refused_where_rows_meet(self, encoder_run, loss, match) -> None:
        """In-batch negatives; a classifier of the loss's own, which path rows would train."""
        with pytest.raises(ValueError, match=match):
            encoder_run(loss, {"path_pass": "mixed"}).train()

    def test_the_loss_modules_own_parameters_see_training_rows_only(self, encoder_run) -> None:
        grads = []
        for options in ({"path_pass": "separate"}, {"estimator": "instantaneous"}):
            trainer = encoder_run("SoftmaxLoss", options)
            found: list[torch.Tensor] = []

            class Look(transformers.TrainerCallback):
                def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    found.append(trainer.loss.classifier.weight.grad.clone())  # noqa: B023
                    control.should_training_stop = True

            trainer.add_callback(Look())
            torch.manual_seed(0)
            trainer.loss.classifier.reset_parameters()
            trainer.train()
            grads.append(found[0])
        assert torch.equal(*grads)

    def test_st_3842_without_the_mixin_it_raises(self, encoder_run) -> None:
        with pytest.raises(ValueError, match="training passes without one: ranks would never be allocated"):
            encoder_run("CosineSimilarityLoss", {}, mixin=False).train()

    def test_it_resumes(self, encoder_run, state_of, assert_same) -> None:
        whole = encoder_run("CosineSimilarityLoss", {}, save_strategy="steps", save_steps=11)
        whole.train()
        resumed = encoder_run("CosineSimilarityLoss", {}, save_strategy="steps", save_steps=11)
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-11"))
        assert_same(state_of(resumed), state_of(whole))


# -- TRL ------------------------------------------------------------------------------------------------------------------


class TestSFTTrainer:
    pytestmark = QUIET

    @pytest.mark.parametrize("path_pass", ["mixed", "separate"])
    def test_the_budget_is_met_and_a_run_resumes(
        self, llama, rows, config, tmp_path, state_of, assert_same, path_pass
    ) -> None:
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        tokenizers = pytest.importorskip("tokenizers")

        class IGUSFTTrainer(IGUTrainerMixin, trl.SFTTrainer):
            pass

        words = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(36)}}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        )
        data = datasets.Dataset.from_dict({"text": texts(37, 1)})

        def make(**changes: Any) -> Any:
            args = trl.SFTConfig(
                output_dir=str(tmp_path / "out"), max_steps=20, per_device_train_batch_size=4, bf16=False,
                gradient_accumulation_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
                save_strategy="steps", save_steps=11, dataloader_pin_memory=False, max_length=16, **changes,
            )  # fmt: skip
            return IGUSFTTrainer(
                model=llama(), args=args, train_dataset=data, processing_class=fast,
                igu_config=config(path_pass=path_pass).to_dict(),
            )  # fmt: skip

        whole = make()
        whole.train()
        assert sum(whole.igu_controller.live_ranks().values()) == 14
        assert whole._divides_by_items
        resumed = make()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-11"))
        assert_same(state_of(resumed), state_of(whole))


# -- data-parallel processes ----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import transformers
from safetensors.torch import save_file
import igulora
from igulora.trainer import IGUTrainer

torch.set_num_threads(1)
folder = sys.argv[1]
shape = transformers.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
generator = torch.Generator().manual_seed(1)
rows = []
for i in range(37):
    ids = torch.randint(1, 40, (9,), generator=generator)
    labels = ids.clone()
    labels[: i % 5] = -100
    rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
for resume in (None, folder + "/out/checkpoint-8"):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(shape)
    args = transformers.TrainingArguments(
        output_dir=folder + "/out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=20, use_cpu=True,
        ddp_backend="gloo", report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=8, learning_rate=3e-3,
        dataloader_pin_memory=False,
    )
    config = igulora.IGUConfig(
        r=4, target_rank=2, total_steps=20, t_init=9, t_final=5, delta_t=2, window=3, ig_every=1, path_pass="mixed"
    )
    trainer = IGUTrainer(model=igulora.adapt(model, config), args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    bank, scores = trainer.igu_controller.bank, trainer.igu_controller.importance
    name = f"{args.process_index}-{'resumed' if resume else 'whole'}"
    save_file({"weight": bank.weight, "live": bank.live, "mean": scores.mean}, f"{folder}/{name}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path: Path) -> None:
    """Different batches, equal masks; resumed in the middle of a window, from what one process wrote."""
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "train.py"), str(tmp_path)], text=True, cwd=tmp_path,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    names = ("0-whole", "1-whole", "0-resumed", "1-resumed")
    runs = {name: load_file(tmp_path / f"{name}.safetensors") for name in names}
    first = runs["0-whole"]
    assert int(first["live"].sum()) == 14
    for name, run in runs.items():
        for key, value in run.items():
            assert torch.equal(first[key], value), (name, key)
