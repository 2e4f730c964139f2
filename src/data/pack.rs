//! Tokenised texts, packed into rows of equal length.

use rayon::prelude::*;

use super::template::Text;
use super::tokenizer::Tokenizer;
use crate::rng::{Purpose, Stream};
use crate::{Error, Result};

/// Texts that are joined into one string before they are cut into rows (as Resa's authors do).
const BLOCK: usize = 2048;

/// Rows of token ids, all of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Tokens in a row.
    pub seq_len: usize,
    /// Token ids, row after row: `[rows, seq_len]`.
    pub tokens: Vec<u32>,
    /// Of every token `[rows, seq_len]`, whether it belongs to an answer part. The EOS that ends an
    /// answer does.
    pub answer_mask: Vec<bool>,
    /// Of every token `[rows, seq_len]`, where in its row its document begins, if attention is to
    /// stay within documents. A document starts at the EOS before its text.
    pub doc_starts: Option<Vec<u32>>,
}

impl Packed {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len() / self.seq_len
    }

    /// Token ids of row `i` `[seq_len]`.
    ///
    /// # Panics
    /// When `i` is not below [`Packed::rows`]; so do the other accessors of a row.
    pub fn row(&self, i: usize) -> &[u32] {
        &self.tokens[i * self.seq_len..][..self.seq_len]
    }

    /// The answer mask of row `i` `[seq_len]`.
    pub fn row_answer_mask(&self, i: usize) -> &[bool] {
        &self.answer_mask[i * self.seq_len..][..self.seq_len]
    }

    /// Document starts of row `i` `[seq_len]`, with a document mask.
    pub fn row_doc_starts(&self, i: usize) -> Option<&[u32]> {
        let starts = self.doc_starts.as_ref()?;
        Some(&starts[i * self.seq_len..][..self.seq_len])
    }
}

/// Packs texts as Resa's authors do: blocks of 2048 texts, an EOS token before each text, cut
/// into rows of exactly `seq_len` tokens; what is left of a block is dropped. Where the tokenizer
/// has a BOS token it is the first of every row.
///
/// # Errors
/// When a text cannot be tokenised, when `seq_len` has no room for a token of text, or when no
/// row becomes full.
pub fn pack(
    texts: &[Text],
    tokenizer: &Tokenizer,
    seq_len: usize,
    document_mask: bool,
) -> Result<Packed> {
    let bos = tokenizer.bos();
    let content = seq_len.saturating_sub(usize::from(bos.is_some()));
    if content == 0 || u32::try_from(seq_len).is_err() {
        let what = format!("{seq_len} is no usable number of tokens for a sequence");
        return Err(Error::setting("--seq-len", what));
    }
    let mut packed = Packed {
        seq_len,
        tokens: Vec::new(),
        answer_mask: Vec::new(),
        doc_starts: document_mask.then(Vec::new),
    };
    let mut longest = 0;
    for block in texts.chunks(BLOCK) {
        let tokens = tokenise(block, tokenizer)?;
        longest = longest.max(tokens.len());
        for row in tokens.chunks_exact(content) {
            packed.push_row(bos, row);
        }
    }
    if packed.tokens.is_empty() {
        let what = format!(
            "a sequence takes {content} tokens of text, the data give {longest} (from {} texts)",
            texts.len()
        );
        return Err(Error::setting("--seq-len", what));
    }
    Ok(packed)
}

/// The order in which `n` rows are used in an epoch: the file's, or a permutation drawn from the
/// seed, another one for each epoch.
pub fn order(n: usize, shuffle_seed: Option<u64>, epoch: u64) -> Vec<usize> {
    match shuffle_seed {
        Some(seed) => Stream::new(seed, Purpose::Shuffle, epoch, 0).permutation(n),
        None => (0..n).collect(),
    }
}

#[derive(Clone, Copy)]
struct Token {
    id: u32,
    in_answer: bool,
    starts_document: bool,
}

impl Packed {
    fn push_row(&mut self, bos: Option<u32>, row: &[Token]) {
        self.tokens.extend(bos);
        self.answer_mask.extend(bos.map(|_| false));
        self.tokens.extend(row.iter().map(|token| token.id));
        self.answer_mask
            .extend(row.iter().map(|token| token.in_answer));
        if let Some(starts) = &mut self.doc_starts {
            let mut start = 0;
            starts.extend(bos.map(|_| start));
            // Positions fit: `pack` checked that seq_len does.
            for (position, token) in (u32::from(bos.is_some())..).zip(row) {
                if token.starts_document {
                    start = position;
                }
                starts.push(start);
            }
        }
    }
}

/// Tokens of one block. Texts are tokenised in parallel where EOS keeps them apart, else the
/// joined block is tokenised in one piece; the result is the same.
fn tokenise(block: &[Text], tokenizer: &Tokenizer) -> Result<Vec<Token>> {
    let mut tokens = if tokenizer.eos_separates() {
        let pieces: Result<Vec<_>> = block
            .par_iter()
            .map(|text| tokenise_piece(std::slice::from_ref(text), tokenizer))
            .collect();
        pieces?.concat()
    } else {
        tokenise_piece(block, tokenizer)?
    };
    for i in 1..tokens.len() {
        if tokens[i].starts_document {
            tokens[i].in_answer = tokens[i - 1].in_answer;
        }
    }
    Ok(tokens)
}

/// Joins texts, an EOS before each, tokenises them as one string and marks every token.
fn tokenise_piece(texts: &[Text], tokenizer: &Tokenizer) -> Result<Vec<Token>> {
    let eos = tokenizer.eos_token();
    let mut joined = String::new();
    // Of each document, the byte where it starts and the byte where its answer part starts.
    let mut documents = Vec::with_capacity(texts.len());
    for text in texts {
        let start = joined.len();
        documents.push((start, start + eos.len() + text.answer_start));
        joined.push_str(eos);
        joined.push_str(&text.text);
    }
    let mut upcoming = documents.iter().copied().peekable();
    let mut answer_start = 0;
    let tokens = tokenizer.encode_located(&joined)?.into_iter();
    Ok(tokens
        .map(|(id, (_, end))| {
            let mut starts_document = false;
            while let Some((_, answer)) = upcoming.next_if(|&(start, _)| end > start) {
                answer_start = answer;
                starts_document = true;
            }
            Token {
                id,
                in_answer: !starts_document && end > answer_start,
                starts_document,
            }
        })
        .collect())
}
