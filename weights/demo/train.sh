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
for size in 128 256; do
    python data.py prepare nih "$DATA/nih" runs/$size/nih --size $size
    python data.py prepare folder "$DATA/nih-more" runs/$size/nih-more --size $size
    python data.py prepare folder "$DATA/kermany" runs/$size/kermany --size $size --table runs/kermany.csv
    python data.py prepare folder "$DATA/hannover" runs/$size/hannover --size $size
done

# Rad-VAE, on crops of the images of 256 pixels. It starts from the demo's VAE before this one (8 channels, 128 pixels,
# three of these four sources) and adds eight channels.
mkdir -p runs/before
git archive 8dfdb4d weights/demo/vae | tar -x -C runs/before
python train.py vae --data runs/256/{nih,nih-more,kermany,hannover} --init runs/before/weights/demo/vae \
    --latent-channels 16 --crop 128 --kl-weight 1e-4 --optimizer muon --lr 1e-3 --batch 8 --warmup 800 --ema 2000 \
    --images 36864 --cooldown 10240 --log-every 32 --out runs/vae

# RadiT, at 128 pixels: 64 tokens an image.
python -m autoencoder encode runs/128/{nih,nih-more,kermany,hannover} --vae runs/vae/weights/vae \
    --out runs/latents128 --versions 6
python train.py radit --data runs/128/{nih,nih-more,kermany,hannover} --latents runs/latents128 \
    --vae runs/vae/weights/vae --size XS --shift 2 --lr 1e-3 --warmup 5000 --images 262144 --cooldown 65536 \
    --ema 10000,50000 --log-every 64 --save-every 1024 --out runs/radit128

# The same weights continued at 256 pixels: 256 tokens an image.
python -m autoencoder encode runs/256/{nih,nih-more,kermany,hannover} --vae runs/vae/weights/vae \
    --out runs/latents256 --versions 3
python train.py radit --data runs/256/{nih,nih-more,kermany,hannover} --latents runs/latents256 \
    --vae runs/vae/weights/vae --init runs/radit128/weights --batch 32 --lr 7e-4 --warmup 4000 --images 90112 \
    --cooldown 24576 --ema 5000,20000 --log-every 16 --save-every 512 --out runs/radit256

cp -r runs/radit256/weights/. weights/demo/
python sample.py --out out/demo
cp out/demo/grid.png weights/demo/
python weights/demo/pictures.py
