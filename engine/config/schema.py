"""Every key of a recipe: its type, its range and what it means.

Values live in ``conf/`` and in recipes; this module says what is allowed. The docstring under a field is what ``--help`` shows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


Words = Annotated[str, Field(pattern=r"^\S[^\r\n]*$")]
"""One line."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Count = Annotated[Integer, Field(ge=1)]
NonNegative = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of keys; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunSection(Section):
    """Where a run lives and how it may be repeated."""

    dir: str = Field(min_length=1)
    """Run folder; everything the run produces is below it."""
    name: Name
    """Name of the run, used in the default folder."""
    seed: NonNegative
    """Seed of the order of the data, random weights and dropout."""
    resume: str = Field(min_length=1)
    """auto: continue run.dir if it has checkpoints; never: refuse if it has; else a run or checkpoint folder to continue."""
    deterministic: bool
    """Bit-for-bit repeatable operations; one that has no such form ends the run (docs/kernels.md)."""
    probe: bool
    """Check on this very model, before step 1, that packing and the fused loss equal the model's own logits."""
    callbacks: list[str]
    """Callbacks as module:Class, called in this order (see docs/callbacks.md)."""
    record_memory: bool
    """Record the device's allocations and write torch's memory snapshot of every rank to run.dir/memory."""
    profile_steps: tuple[Count, Count] | None
    """First and last step that torch.profiler traces to run.dir/profile; null: none."""
    prepare_only: bool
    """End where training would begin, with the data tokenised and the reference's log-probabilities in data.cache_dir."""


class LoraSection(Section):
    """Low-rank adapters (Hu et al., 2021) in place of all weights (docs/lora.md)."""

    enabled: bool
    """Train adapters alone; the model's own weights stay as they are."""
    rank: Count
    """Rank of an adapter."""
    alpha: Positive
    """Scale of an adapter's output, divided by the rank."""
    dropout: Fraction
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: list[str] | None
    """Names of the layers that get adapters, as q_proj; null: all linear layers but the output layer."""
    merge: bool
    """Write run.dir/hf, the model with the adapters merged in; false: only run.dir/adapter, in peft's format."""


class ModelSection(Section):
    """The model, its tokenizer and its template."""

    path: str = Field(min_length=1)
    """Folder or hub id of a transformers causal language model, or builtin:tiny_llama."""
    revision: str | None
    """Revision of a hub id."""
    config_overrides: dict[str, Any]
    """Fields of the model's config.json to replace, checked against its own fields."""
    init: Literal["pretrained", "random"]
    """pretrained: load the folder's weights; random: fresh weights from run.seed."""
    tokenizer: str | None
    """Folder or hub id of the tokenizer; null: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Compute type; master weights and optimizer are float32. auto: bfloat16 on CUDA, float32 on CPU."""
    attention: Literal["auto", "sdpa", "triton", "flash_attention", "varlen"]
    """Packed attention. triton: our kernels; sdpa: one call a document. auto, on CUDA: FlashAttention-3 or -2 if installed, then
    torch's varlen, and triton where these cannot serve and with run.deterministic; on CPUs: sdpa."""
    liger: Literal["auto", True, False]
    """Liger's kernels for RMSNorm, RoPE and the gated MLP. auto: on CUDA, for the models that they are tested with."""
    chat_template: str | None
    """default: the tokenizer's own; null: contents are concatenated; else a Jinja string or a file."""
    template_args: dict[str, Any]
    """Variables handed to the chat template (enable_thinking: false, say)."""
    trust_remote_code: bool
    """Run code that comes with the model folder."""
    compile: bool
    """Compile each decoder layer with torch.compile."""
    recompute: Literal["none", "full"]
    """full: recompute each layer's activations in the backward pass to save memory."""
    lora: LoraSection
    """Adapters in place of all weights."""


class PackingSection(Section):
    """How samples become micro-batches."""

    enabled: bool
    """True: samples are packed without padding; false: padded micro-batches of train.micro_batch_size."""
    max_tokens: Count | None
    """Most tokens in a packed micro-batch; null: the larger of 4096 and data.max_length (twice that for pairs)."""
    share_prompts: bool
    """Let a prompt that both answers of a pair have go through the model once; of no effect without packing."""


class SourceSection(Section):
    """One source of a mixture; what is left out has the default (docs/data.md)."""

    source: str | None = None
    """Choice of the data group whose keys this source takes, before its own."""
    name: Name
    """Its name in metrics; left out: that of the choice or the file."""
    path: str = Field(min_length=1)
    """File, folder or hub id."""
    split: str = "train"
    """Split of a hub data set or folder; a slice such as train[:100] of anything."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Revision of a hub id; null: the newest, noted in lock.json."""
    weight: Positive | None = None
    """Its share of the training samples, relative to the other sources; left out by all: each is seen once an epoch."""
    limit: Count | None = None
    """Rows read of it; null: all."""
    chat_template: str | None = "model"
    """model: model.chat_template; else as there."""
    reader: str | None = None
    chat_key: str | None = None
    tool_key: str = "tools"
    system_key: str = "system"
    system_prompt: str | None = None
    input_key: str | None = None
    output_key: str | None = None
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    ties: Literal["drop", "error"] = "drop"


class DataSection(Section):
    """Where conversations come from and which of their tokens are trained (docs/data.md)."""

    train_path: str | None = Field(min_length=1)
    """File, folder or hub id of the training conversations, or of pairs (algorithm=dpo)."""
    val_path: str | None
    """File, folder or hub id of the validation conversations; null: no validation."""
    train_split: str
    """Split of a hub data set or folder to train on; a slice such as train[:100] of anything."""
    val_split: str
    """Split of a hub data set or folder to validate on; a slice such as validation[:10%] of anything."""
    subset: str | None
    """Configuration of a hub data set that has several."""
    revision: str | None
    """Revision of a hub id; null: the newest, noted in lock.json."""
    limit: Count | None
    """Rows read to train on, and to validate on; null: all."""
    val_fraction: Fraction
    """Share of the training conversations held out to validate on, by a hash of each row; 0: none."""
    train: list[SourceSection]
    """Several sources to train on, in place of train_path."""
    validation: list[SourceSection]
    """Several sources to validate on, with keys as in train and metrics of their own, in place of val_path."""
    reader: str | None
    """Format of a row (docs/data.md), or module:function of your own; null: recognised from the first row's columns."""
    chat_key: str | None
    """Column of the messages; null: messages (conversations in sharegpt)."""
    tool_key: str
    """Column of the tools, where rows have it: a list, or a JSON string of one."""
    system_key: str
    """Column of the system prompt, where rows have it; for rows that do not open with a system turn."""
    system_prompt: str | None
    """System prompt of rows that have none of their own."""
    input_key: str | None
    """Column of the question (response), or of the prompt (binary_preference; null: prompt)."""
    output_key: str | None
    """Column of the answer (response)."""
    chosen_key: str
    """Column of the better answer (binary_preference, pairs of sharegpt)."""
    rejected_key: str
    """Column of the worse answer (binary_preference, pairs of sharegpt)."""
    max_length: Count
    """Longest sample in tokens; null: 4096, or what the model reads if that is less."""
    overlong: Literal["drop", "truncate", "error"]
    """What happens to a sample longer than max_length; drops and cuts are counted."""
    train_on: Literal["last_assistant", "all_assistant", "all"]
    """Which turns carry loss; "all" trains on every token; a turn's own train and weight take precedence (docs/masks.md)."""
    shuffle: bool
    """Draw each epoch in its own order; false: the order of the file."""
    drop_last: bool
    """Drop the last, partial batch of an epoch."""
    add_bos: bool
    """Put the tokenizer's beginning-of-sequence token before a sample that lacks it."""
    add_eos: bool
    """Put the end-of-sequence token after a sample that lacks it; trained where the last turn is."""
    packing: PackingSection
    """Packing of samples into micro-batches."""
    ties: Literal["drop", "error"]
    """A pair whose completions have the same rank: drop it, counted, or treat it as a bad row."""
    bad_rows: Literal["error", "skip"]
    """A row that cannot be used: stop and name the first ten, or skip it, counted and listed in the run folder."""
    cache: Literal["use", "rebuild", "off"]
    """Tokenised samples and log-probabilities of references: reuse them, make them anew, or keep them in the run folder alone."""
    cache_dir: str | None
    """Folder of tokenised data and references' log-probabilities, shared by runs; null: $ANNEAL_CACHE or ~/.cache/anneal."""
    num_workers: Count | None
    """Processes that tokenise; null: one a core, at most 8."""


class AlgorithmSection(Section):
    """What is minimised, how long to train and when to validate."""

    name: Literal["sft", "dpo"]
    """Objective: sft or dpo (docs/objectives.md)."""
    max_num_steps: NonNegative | None
    """Optimizer steps; with max_num_epochs, whichever comes first."""
    max_num_epochs: Positive | None
    """Passes over the data; with max_num_steps, whichever comes first."""
    val_period: NonNegative
    """Steps between validations; 0: none along the way."""
    val_batches: NonNegative
    """Validation batches; 0: all."""
    val_global_batch_size: Count | None
    """Conversations in a validation batch; null: train.global_batch_size."""
    val_micro_batch_size: Count | None
    """Conversations in a padded validation micro-batch; null: train.micro_batch_size."""
    val_at_start: bool
    """Validate before the first step."""
    val_at_end: bool
    """Validate after the last step."""
    preference_loss: str | None
    """dpo: sigmoid, ipo, hinge, robust, simpo, orpo, or a further one (docs/objectives.md)."""
    reference_policy_kl_penalty: Positive | None
    """dpo: β, how strongly the policy is held to the reference."""
    preference_average_log_probs: bool | None
    """dpo: divide an answer's log-probability by its number of tokens in the preference loss."""
    sft_average_log_probs: bool | None
    """dpo: the same in the SFT term."""
    preference_loss_weight: Annotated[Number, Field(ge=0)] | None
    """dpo: weight of the preference loss."""
    sft_loss_weight: Annotated[Number, Field(ge=0)] | None
    """dpo: weight of the SFT term, the negative log-likelihood of the chosen answers."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] | None
    """dpo: share of the pairs that may be the wrong way round (sigmoid: conservative DPO; robust)."""
    preference_margin: Number | None
    """dpo: γ, the margin of simpo by which chosen is to exceed rejected."""
    reference: str | None
    """dpo: initial (the weights that training starts from), none, or a model folder or hub id."""

    @property
    def together(self) -> int:
        """Documents of each conversation, which stay in one micro-batch: 2 where the data are pairs."""
        return 2 if self.name == "dpo" else 1


class TrainSection(Section):
    """The size of a step."""

    global_batch_size: Count
    """Conversations in an optimizer step; pairs in dpo."""
    micro_batch_size: Count
    """Conversations in a padded micro-batch (data.packing.enabled=false); pairs in dpo, which are two rows each."""
    max_grad_norm: Positive
    """Gradients are clipped to this global L2 norm."""


class OptimizerSection(Section):
    """AdamW (Loshchilov and Hutter, 2019); no decay on norms and biases."""

    name: Literal["adamw"]
    """Optimizer."""
    lr: Positive
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction]
    """Decay rates of the first and second moments."""
    eps: Positive
    """Added to the root of the second moment."""
    weight_decay: Annotated[Number, Field(ge=0)]
    """Decoupled weight decay, on matrices only."""


class SchedulerSection(Section):
    """Learning rate as a function of the step."""

    name: Literal["constant", "linear", "cosine", "wsd"]
    """Shape after the warm-up; wsd: constant, then a linear decay over the last decay_steps."""
    warmup_steps: NonNegative | None
    """Steps of linear warm-up; exclusive with warmup_ratio."""
    warmup_ratio: Fraction | None
    """Warm-up as a share of all steps; null: 0.03 unless warmup_steps is set."""
    decay_steps: Count | None
    """Length of wsd's decay; null: a tenth of all steps."""
    min_lr: Annotated[Number, Field(ge=0)]
    """Learning rate at the end of the decay."""


class TorchSection(Section):
    """How the torch backend spreads a model over several ranks (FSDP2)."""

    shard_size: Count | None
    """Ranks that share one copy of the model; null: all of them; 1: a whole copy each. Divides the number of ranks."""
    reshard_after_forward: bool
    """Give up a layer's gathered weights after its forward pass and gather them again: less memory, more traffic."""
    cpu_offload: bool
    """Keep weights, gradients and optimizer in the host's memory between their uses."""


class BackendSection(Section):
    """What computes the step."""

    name: Literal["torch", "megatron"]
    """torch: a transformers model, sharded over the ranks; megatron: the same model in megatron-core (docs/megatron.md)."""
    torch: TorchSection
    tensor_parallel: Count | None
    """megatron: ranks of one machine that split each layer's matrices."""
    sequence_parallel: bool | None
    """megatron: split by tokens what tensor parallelism leaves whole; null: true with tensor_parallel of 2 or more."""
    pipeline_parallel: Count | None
    """megatron: stages that the layers are split into."""
    virtual_pipeline: Annotated[Integer, Field(ge=2)] | None
    """megatron: chunks of layers a stage, for less waiting; null: one."""
    context_parallel: Count | None
    """megatron: ranks that split each sequence."""
    expert_parallel: Count | None
    """megatron: ranks, of those of a pipeline's stage, that split the experts."""
    overlap: bool | None
    """megatron: reduce gradients and gather weights while computing."""
    transformer_config: dict[str, Any] | None
    """megatron: fields of megatron-core's TransformerConfig to replace, checked against its own fields."""


class ClusterSection(Section):
    """Where the run's ranks are (docs/distributed.md)."""

    name: Literal["local", "ray_local", "ray", "env", "slurm"]
    """local: this process; ray_local: all devices of this machine; ray: a running Ray cluster; env: started by torchrun or srun;
    slurm: a job that is submitted, with Ray on its machines (docs/slurm.md)."""
    address: str | None
    """Address of the running Ray cluster (cluster=ray): auto or HOST:PORT."""
    num_nodes: Count
    """Machines."""
    gpus_per_node: Count | None
    """Ranks a machine, one a GPU; null: all GPUs that there are."""
    num_workers: Count | None
    """Ranks of a run on CPUs, in all."""
    max_failures: NonNegative
    """How often lost ranks are replaced and the run goes on from its last checkpoint."""
    max_parallel: Count | None
    """Runs of a sweep (-m) at a time; null: one after another on this machine, as many as the scheduler lets on Slurm."""
    partition: Words | None
    """slurm: partition, or several with commas; null: the cluster's default."""
    account: Words | None
    """slurm: account that is charged."""
    qos: Words | None
    """slurm: quality of service."""
    constraint: Words | None
    """slurm: features that machines must have, as sbatch takes them."""
    exclusive: bool
    """slurm: whole machines, with all their cores and memory."""
    time_min: Count | None
    """slurm: minutes a job may take, after which it saves, is queued again and goes on; null: the partition's default."""
    setup: list[str]
    """slurm: lines of bash that the job begins with, such as module load cuda/12.8."""
    sbatch: dict[str, Any]
    """slurm: further parameters by sbatch's names, such as {mem: 200G, reservation: ours}; true for a flag."""
    prepare: Literal["job", "here", "none"] | None
    """slurm: tokenise and download in a job without GPUs that the run waits for, here before submitting, or in the run itself."""
    prepare_partition: Words | None
    """slurm: partition of the job that prepares; null: cluster.partition."""
    wait: bool
    """slurm: follow the run until it ends, and end with its exit code; false: return once it is submitted."""


class CheckpointSection(Section):
    """What is saved and kept."""

    period: NonNegative
    """Steps between checkpoints; 0: one at the end only."""
    keep_last: Count
    """Newest checkpoints kept."""
    keep_best: NonNegative
    """Best checkpoints by metric kept beside them."""
    metric: str = Field(min_length=1)
    """Metric that ranks checkpoints."""
    mode: Literal["min", "max"]
    """Whether a lower or a higher metric is better."""
    async_save: bool
    """Copy the state to the host and write it while training goes on."""
    hf_period: NonNegative
    """Steps between Hugging Face folders, run.dir/hf_steps/step_… (of adapters: adapter_steps); 0: only at the end."""


class WandbSection(Section):
    """Weights & Biases; the API key comes from its own login or WANDB_API_KEY."""

    project: str = Field(min_length=1)
    """Project."""
    entity: str | None
    """User or team; null: the login's default."""
    tags: list[str]
    """Tags of the run."""


class MlflowSection(Section):
    """MLflow."""

    tracking_uri: str | None
    """Server or folder; null: $MLFLOW_TRACKING_URI or run.dir/mlruns."""
    experiment: str = Field(min_length=1)
    """Experiment."""


class LoggerSection(Section):
    """Where metrics go; metrics.jsonl is always written."""

    backends: list[Literal["console", "wandb", "tensorboard", "mlflow"]]
    """Loggers beside metrics.jsonl."""
    wandb: WandbSection
    mlflow: MlflowSection


class RunConfig(Section):
    """A complete recipe."""

    run: RunSection
    model: ModelSection
    data: DataSection
    algorithm: AlgorithmSection
    train: TrainSection
    optimizer: OptimizerSection
    scheduler: SchedulerSection
    backend: BackendSection
    cluster: ClusterSection
    checkpoint: CheckpointSection
    logger: LoggerSection


def max_tokens_per_micro_batch(data: DataSection, together: int = 1) -> int:
    """Return the capacity of a packed micro-batch in tokens, where so many documents stay together (2: pairs)."""
    return data.packing.max_tokens or max(4096, together * data.max_length)
