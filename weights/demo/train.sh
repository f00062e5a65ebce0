#!/bin/bash
# The demo weights, from the published images to weights/demo, on CPUs or on a GPU alike:
#
#     bash weights/demo/train.sh DATA        in the repository's folder; DATA holds nih, nih-more, kermany and hannover
#
# Each command continues where it was stopped. On several GPUs, write torchrun --nproc_per_node=N train.py for python
# train.py. The classifier and the causal model are made as README.md says.
set -e
DATA=$1

# Five of eight of the children's training images, so that about a quarter of the images shows children.
mkdir -p runs/128 runs/256
awk -F, 'NR == 1 || $8 != "train" || index("13460", ++n % 8)' "$DATA/kermany/index.csv" > runs/kermany.csv
for size in 128 256; do                                              # 128: for the classifier
    python data.py prepare nih "$DATA/nih" runs/$size/nih --size $size
    python data.py prepare folder "$DATA/nih-more" runs/$size/nih-more --size $size
    python data.py prepare folder "$DATA/kermany" runs/$size/kermany --size $size --table runs/kermany.csv
    python data.py prepare folder "$DATA/hannover" runs/$size/hannover --size $size
done

# Rad-VAE, first on crops of the images of 256 pixels: from the demo's VAE of commit 8dfdb4d (8 channels, 128 pixels,
# three of these four sources), to which eight channels are added. Then on whole images.
mkdir -p runs/before
git archive 8dfdb4d weights/demo/vae | tar -x -C runs/before
python train.py vae --data runs/256/{nih,nih-more,kermany,hannover} --init runs/before/weights/demo/vae \
    --latent-channels 16 --crop 128 --kl-weight 1e-4 --optimizer muon --lr 1e-3 --batch 8 --warmup 800 --ema 2000 \
    --images 36864 --cooldown 10240 --log-every 32 --out runs/vae-crops
python train.py vae --data runs/256/{nih,nih-more,kermany,hannover} --init runs/vae-crops/weights/vae \
    --kl-weight 1e-4 --optimizer muon --lr 1e-3 --batch 32 --warmup 6400 --ema 10000 --images 46080 --cooldown 23040 \
    --log-every 100 --save-every 1000 --out runs/vae

# RadiT, from random weights.
python -m autoencoder encode runs/256/{nih,nih-more,kermany,hannover} --vae runs/vae/weights/vae \
    --out runs/latents --versions 8
python train.py radit --data runs/256/{nih,nih-more,kermany,hannover} --latents runs/latents \
    --vae runs/vae/weights/vae --size XS --shift 2 --lr 1.5e-3 --batch 256 --warmup 51200 --images 1843200 \
    --cooldown 716800 --ema 20000,80000 --log-every 50 --save-every 1800 --out runs/radit

cp -r runs/radit/weights/. weights/demo/
python sample.py --out out/demo
cp out/demo/grid.png weights/demo/
python weights/demo/pictures.py
