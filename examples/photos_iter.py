"""By iteration, on JPEG files that DALI decodes: half a minute on two cores, and once some 5 s to make the files.

python -m fastrunner.train examples/photos_iter.py --cfg-options runner.max_iters=100
"""

custom_imports = dict(imports=["examples.classification"])

model = dict(type="SmallCNN", channels=3, widths=(16, 32, 64))
data = dict(
    samples_per_gpu=32,
    workers_per_gpu=2,
    train=dict(type="Photos", split="train"),
    val=dict(type="Photos", split="val"),
    train_dataloader=dict(drop_last=True),
)
optimizer = dict(type="FusedSGD", lr=0.05, momentum=0.9, weight_decay=5e-4)
optimizer_config = dict(grad_clip=dict(max_norm=5.0))
lr_config = dict(policy="step", step=[400], warmup="linear", warmup_iters=50)
checkpoint_config = dict(interval=100)
evaluation = dict(interval=200, save_best="acc")
log_config = dict(interval=50, hooks=[dict(type="TextLoggerHook")])
runner = dict(type="IterBasedRunner", max_iters=600)
workflow = [("train", 1)]
seed = 0
