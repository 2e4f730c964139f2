//! Work counted by hand, and its reduction.

use super::*;

/// 3 tokens, width 5, 7 of whatever is wide, everything stored in 16 bits that can be; each
/// operand counted by hand.
#[test]
fn least_flop_and_bytes_are_those_counted_by_hand() {
    let (tokens, width, vocab) = (3, 5, 7);
    let (inner, out, rank) = (5, 7, 2);
    let (latents, k) = (7, 2);
    let embedding = Work::Embedding {
        tokens,
        vocab,
        width,
    };
    let rope = Work::Rope {
        tokens,
        heads: 2,
        head_dim: 4,
    };
    let attention = Work::FlashAttention {
        tokens,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };
    let lora = Work::Lora {
        tokens,
        inner,
        out,
        rank,
    };
    let topk = Work::TopK {
        tokens,
        width,
        latents,
        k,
    };
    let decode = Work::SparseDecode {
        tokens,
        width,
        latents,
        k,
    };
    let table = [
        (embedding, Pass::Forward, 0.0, 60.0),
        (embedding, Pass::Backward, 15.0, 30.0 + 140.0),
        (Work::RmsNorm { tokens, width }, Pass::Forward, 60.0, 60.0),
        (Work::RmsNorm { tokens, width }, Pass::Backward, 120.0, 90.0),
        (rope, Pass::Forward, 72.0, 96.0 + 48.0),
        (rope, Pass::Backward, 72.0, 96.0 + 48.0),
        (Work::SwiGlu { tokens, width }, Pass::Forward, 75.0, 90.0),
        (Work::SwiGlu { tokens, width }, Pass::Backward, 150.0, 150.0),
        // Q and O of 96 values, K and V of 48; 9 scores a head, half of them.
        (attention, Pass::Forward, 576.0, 576.0),
        (attention, Pass::Backward, 1440.0, 1152.0),
        // X 15, Y 21, W 35.
        (
            Work::Gemm { tokens, inner, out },
            Pass::Forward,
            210.0,
            142.0,
        ),
        (
            Work::Gemm { tokens, inner, out },
            Pass::Backward,
            210.0,
            142.0,
        ),
        // A 10 and B 14 in four bytes.
        (lora, Pass::Forward, 210.0 + 144.0, 142.0 + 96.0),
        (lora, Pass::Backward, 210.0 + 288.0, 102.0 + 70.0 + 192.0),
        (topk, Pass::Forward, 210.0, 30.0 + 140.0 + 48.0),
        (topk, Pass::Backward, 60.0 + 70.0, 60.0 + 280.0),
        (decode, Pass::Forward, 60.0, 120.0 + 30.0 + 48.0),
        (decode, Pass::Backward, 120.0, 60.0 + 280.0),
        (Work::Fvu { tokens, width }, Pass::Forward, 45.0, 60.0),
        (Work::Fvu { tokens, width }, Pass::Backward, 30.0, 90.0),
        (
            Work::KlDiv {
                tokens,
                width,
                vocab,
            },
            Pass::Forward,
            420.0,
            130.0,
        ),
        (
            Work::KlDiv {
                tokens,
                width,
                vocab,
            },
            Pass::Fused,
            630.0,
            160.0,
        ),
        (
            Work::CrossEntropy {
                tokens,
                width,
                vocab,
            },
            Pass::Forward,
            210.0,
            100.0,
        ),
        (
            Work::CrossEntropy {
                tokens,
                width,
                vocab,
            },
            Pass::Fused,
            420.0,
            130.0,
        ),
        // X 15, Y 21, W 35.
        (
            Work::DecodeLinear {
                batch: 3,
                inner,
                out,
            },
            Pass::Forward,
            210.0,
            142.0,
        ),
        // 3 scores and 3 weights of 4 heads of 8; K and V of 48, q and o of 32.
        (
            Work::DecodeAttention {
                tokens,
                heads: 4,
                kv_heads: 2,
                head_dim: 8,
            },
            Pass::Forward,
            384.0,
            320.0,
        ),
        (Work::Sample { batch: 3, vocab }, Pass::Forward, 84.0, 84.0),
        (Work::AdamW { values: 10 }, Pass::Step, 140.0, 280.0),
        (Work::Signum { rows: 3, width }, Pass::Step, 180.0, 300.0),
        (Work::Clip { values: 10 }, Pass::Step, 30.0, 120.0),
    ];
    let size = Bytes {
        activation: 2,
        weight: 2,
    };
    for (work, pass, flop, bytes) in table {
        let found = work.least(pass, size);
        assert_eq!(found, Least { flop, bytes }, "{} {pass}", work.operator());
    }
}

#[test]
fn only_frozen_weights_take_the_size_of_a_weight() {
    let gemm = Work::Gemm {
        tokens: 3,
        inner: 5,
        out: 7,
    };
    let bytes = |activation, weight| {
        gemm.least(Pass::Forward, Bytes { activation, weight })
            .bytes
    };
    assert_eq!(bytes(4, 4) - bytes(4, 2), 70.0);
    assert_eq!(bytes(4, 2) - bytes(2, 2), 72.0);
}

#[test]
fn work_is_halved_until_it_keeps_the_limits_tokens_first() {
    let size = Bytes {
        activation: 4,
        weight: 4,
    };
    let limits = |flop| Limits {
        flop,
        bytes: f64::INFINITY,
    };
    let whole = Work::KlDiv {
        tokens: 2048,
        width: 64,
        vocab: 4096,
    };
    let flop = whole.least(Pass::Forward, size).flop;
    let within = |flop| whole.within(limits(flop), Pass::Forward, size);
    assert_eq!(within(flop), whole);
    assert_eq!(
        within(flop / 3.0),
        Work::KlDiv {
            tokens: 512,
            width: 64,
            vocab: 4096
        }
    );
    assert_eq!(
        within(flop / 64.0),
        Work::KlDiv {
            tokens: 128,
            width: 64,
            vocab: 1024
        }
    );
    // What cannot become smaller stays.
    assert_eq!(
        within(1.0),
        Work::KlDiv {
            tokens: 128,
            width: 64,
            vocab: 256
        }
    );
}
