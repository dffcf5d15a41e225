"""Which device a process takes, what it says of it, and the precision that it has."""

import pytest
import torch

from u2seg import device as D


def test_a_process_says_once_where_it_computes_and_why(tmp_path, monkeypatch, capsys):
    D._say_device.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert D.own_device() == D.own_device() == torch.device('cpu')
    said = capsys.readouterr().err
    assert said.startswith('computing on the CPU: ') and said.count('\n') == 1
    driver = tmp_path / 'version'
    assert D._why_no_gpu(driver) == 'there is no NVIDIA GPU'
    driver.write_text('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build\n')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert D._why_no_gpu(driver) == 'CUDA_VISIBLE_DEVICES hides the GPUs'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'built without CUDA' in D._why_no_gpu(driver)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert 'driver 470.82.01 does not serve CUDA 13.0' in D._why_no_gpu(driver)


def test_more_processes_than_gpus_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for rank, index in (('0', 0), ('1', 1), ('5', 1)):
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert D.own_device() == torch.device('cuda', index)


@pytest.mark.parametrize('capability, amp', [((7, 5), 'fp16'), ((8, 0), 'bf16')])
def test_bfloat16_is_for_ampere_and_later(monkeypatch, capsys, capability, amp):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert D.usable_amp('bf16', torch.device('cuda', 0)) == amp
    assert ('does not compute in bfloat16' in capsys.readouterr().out) == (amp == 'fp16')
    assert [D.usable_amp(a, torch.device('cuda', 0)) for a in ('fp16', None)] == ['fp16', None]


def test_a_cpu_takes_float32_where_arithmetic_is_exact(monkeypatch):
    monkeypatch.setenv('U2SEG_ARITHMETIC', 'exact')
    assert D.usable_amp('bf16', torch.device('cpu')) is None
