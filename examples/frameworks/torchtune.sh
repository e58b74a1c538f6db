#!/bin/sh
# torchtune takes any optimizer by its name; `fused` is torch.optim.AdamW's.
tune run lora_finetune_single_device --config llama3_2/1B_lora_single_device \
    optimizer=scao_hf.SCAO optimizer.lr=2e-4 optimizer.weight_decay=0.0 ~optimizer.fused "$@"
