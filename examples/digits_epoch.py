"""By epoch, with evaluation, averaged weights and the best checkpoint: some seconds on one core.

python -m fastrunner.train examples/digits_epoch.py
python -m fastrunner.verify_resume examples/digits_epoch.py --at 30
"""

custom_imports = dict(imports=["examples.classification"])

model = dict(type="SmallCNN", channels=1, widths=(32, 64))
data = dict(
    samples_per_gpu=64,
    workers_per_gpu=0,
    train=dict(type="Digits", split="train"),
    val=dict(type="Digits", split="val"),
)
optimizer = dict(type="FusedSGD", lr=0.1, momentum=0.9, weight_decay=1e-4)
optimizer_config = dict(grad_clip=dict(max_norm=1.0))
lr_config = dict(policy="CosineAnnealing", min_lr=0, warmup="linear", warmup_iters=20)
custom_hooks = [dict(type="EMAHook", momentum=0.01, priority="ABOVE_NORMAL")]
checkpoint_config = dict(interval=2, max_keep_ckpts=2)
evaluation = dict(interval=1, save_best="acc")
log_config = dict(interval=10, hooks=[dict(type="TextLoggerHook")])
runner = dict(type="EpochBasedRunner", max_epochs=8)
workflow = [("train", 1)]
seed = 0
