//! Loads and stores of a warp in every state space, checked and counted.

use super::block::Context;
use super::checks::{lanes, misaligned};
use super::registers::LANES;
use super::warp::Warp;
use crate::ptx::ast::Space;
use crate::ptx::ops::Access;
use crate::ptx::program::{CLUSTER_SHIFT, WINDOW_MASK, WINDOW_SHIFT};
use crate::sanitize::global::Touch;
use crate::sanitize::{Checked, Fault, Kind, shared};

/// Lane values of up to four vector elements.
type Elements = [[u64; LANES]; 4];

/// The space a generic address lies in.
pub fn window_space(address: u64) -> Space {
    match address >> WINDOW_SHIFT {
        1 if address >> CLUSTER_SHIFT & 0xff != 0 => Space::Cluster,
        1 => Space::Shared,
        2 => Space::Local,
        3 => Space::Param,
        _ => Space::Global,
    }
}

/// Splits an access by the spaces its lanes' addresses lie in; most have one.
fn split(space: Space, addresses: &[u64; LANES], exec: u32) -> [(Space, u32); 5] {
    let mut out = [
        (Space::Global, 0),
        (Space::Shared, 0),
        (Space::Cluster, 0),
        (Space::Local, 0),
        (Space::Param, 0),
    ];
    if space != Space::Generic {
        out[0] = (
            if space == Space::Const {
                Space::Global
            } else {
                space
            },
            exec,
        );
        return out;
    }
    for lane in lanes(exec) {
        let found = window_space(addresses[lane]);
        for slot in &mut out {
            if slot.0 == found {
                slot.1 |= 1 << lane;
            }
        }
    }
    out
}

fn sign_extend(value: u64, size: u64) -> u64 {
    let shift = 64 - 8 * size as u32;
    ((value << shift) as i64 >> shift) as u64
}

impl Warp {
    pub(super) fn load(
        &mut self,
        ctx: &mut Context<'_>,
        access: &Access,
        exec: u32,
    ) -> Checked<()> {
        let addresses = self.addresses(&access.address);
        let mut values: Elements = [[0; LANES]; 4];
        for (space, mask) in split(access.space, &addresses, exec) {
            if mask != 0 {
                self.load_from(ctx, space, access, &addresses, mask, &mut values)?;
            }
        }
        for (n, value) in values
            .iter_mut()
            .enumerate()
            .take(usize::from(access.count))
        {
            if access.discard >> n & 1 == 1 {
                continue;
            }
            if access.signed {
                *value = value.map(|v| sign_extend(v, access.size.into()));
            }
            self.regs.write_any(access.regs[n], value, exec);
        }
        Ok(())
    }

    /// One element per lane from these addresses.
    pub fn load_lanes(
        &mut self,
        ctx: &mut Context<'_>,
        access: &Access,
        addresses: &[u64; LANES],
    ) -> Checked<[u64; LANES]> {
        let mut values: Elements = [[0; LANES]; 4];
        for (space, mask) in split(access.space, addresses, u32::MAX) {
            if mask != 0 {
                self.load_from(ctx, space, access, addresses, mask, &mut values)?;
            }
        }
        Ok(values[0])
    }

    /// One element per lane to these addresses.
    pub fn store_lanes(
        &mut self,
        ctx: &mut Context<'_>,
        access: &Access,
        addresses: &[u64; LANES],
        value: &[u64; LANES],
    ) -> Checked<()> {
        let mut values: Elements = [[0; LANES]; 4];
        values[0] = *value;
        for (space, mask) in split(access.space, addresses, u32::MAX) {
            if mask != 0 {
                self.store_to(ctx, space, access, addresses, mask, &values)?;
            }
        }
        Ok(())
    }

    fn load_from(
        &mut self,
        ctx: &mut Context<'_>,
        space: Space,
        access: &Access,
        addresses: &[u64; LANES],
        mask: u32,
        values: &mut Elements,
    ) -> Checked<()> {
        let (size, count) = (u64::from(access.size), usize::from(access.count));
        let total = size * count as u64;
        match space {
            Space::Shared => {
                ctx.counters.shared_access(addresses, total, mask);
                let touch = if access.strong {
                    shared::Touch::Atomic
                } else {
                    shared::Touch::Read
                };
                let whole = ctx.shared_together(addresses, total, mask, touch, self.index);
                for lane in lanes(mask) {
                    let at = match whole {
                        true => (addresses[lane] & WINDOW_MASK) as usize,
                        false => ctx.shared_range(
                            addresses[lane],
                            total,
                            total,
                            touch,
                            self.index,
                            lane,
                        )?,
                    };
                    for (n, value) in values.iter_mut().enumerate().take(count) {
                        value[lane] = ctx.shared_read(at + n * size as usize, size as usize);
                    }
                }
            }
            Space::Cluster => {
                let touch = if access.strong {
                    shared::Touch::Atomic
                } else {
                    shared::Touch::Read
                };
                for lane in lanes(mask) {
                    let place = ctx.place(addresses[lane], lane)?;
                    let at = ctx.visit(place, total, total, touch, self.index, lane)?;
                    let memory = ctx.memory_of(place.rank);
                    for (n, value) in values.iter_mut().enumerate().take(count) {
                        value[lane] = memory.read(at + n * size as usize, size as usize);
                    }
                }
                ctx.counters.remote_access(total, mask);
            }
            Space::Local => {
                for lane in lanes(mask) {
                    for (n, value) in values.iter_mut().enumerate().take(count) {
                        let at = (addresses[lane] & WINDOW_MASK) + n as u64 * size;
                        value[lane] = self.local_read(at, size, lane)?;
                    }
                }
            }
            Space::Param => {
                for lane in lanes(mask) {
                    for (n, value) in values.iter_mut().enumerate().take(count) {
                        let at = (addresses[lane] & WINDOW_MASK) + n as u64 * size;
                        value[lane] = ctx.launch.param(at, size, lane)?;
                    }
                }
            }
            _ => {
                ctx.counters.global_access(true, addresses, total, mask);
                let touch = if access.strong {
                    Touch::Atomic
                } else {
                    Touch::Read
                };
                if touch == Touch::Read
                    && let Some(allocation) = ctx.common_allocation(addresses, total, mask)
                {
                    let whole = ctx.touch_row(allocation, addresses, total, touch, mask);
                    for lane in lanes(mask) {
                        let at = match whole {
                            true => addresses[lane] - allocation.base,
                            false => ctx.touch(allocation, addresses[lane], total, touch, lane)?,
                        };
                        for (n, value) in values.iter_mut().enumerate().take(count) {
                            value[lane] = allocation.read(at + n as u64 * size, size);
                        }
                    }
                    return Ok(());
                }
                for lane in lanes(mask) {
                    let (allocation, at) =
                        ctx.global(addresses[lane], total, total, touch, lane)?;
                    for (n, value) in values.iter_mut().enumerate().take(count) {
                        value[lane] = allocation.read(at + n as u64 * size, size);
                    }
                }
                if access.strong {
                    ctx.acquire();
                }
            }
        }
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        ctx: &mut Context<'_>,
        access: &Access,
        exec: u32,
    ) -> Checked<()> {
        let addresses = self.addresses(&access.address);
        let count = usize::from(access.count);
        ctx.fenced |= access.release;
        let mut values: Elements = [[0; LANES]; 4];
        for (value, reg) in values.iter_mut().zip(access.regs).take(count) {
            *value = self.regs.read_any(reg);
        }
        for (space, mask) in split(access.space, &addresses, exec) {
            if mask != 0 {
                self.store_to(ctx, space, access, &addresses, mask, &values)?;
            }
        }
        Ok(())
    }

    fn store_to(
        &mut self,
        ctx: &mut Context<'_>,
        space: Space,
        access: &Access,
        addresses: &[u64; LANES],
        mask: u32,
        values: &Elements,
    ) -> Checked<()> {
        let (size, count) = (u64::from(access.size), usize::from(access.count));
        let total = size * count as u64;
        match space {
            Space::Shared => {
                ctx.counters.shared_access(addresses, total, mask);
                let touch = if access.strong {
                    shared::Touch::Atomic
                } else {
                    shared::Touch::Write
                };
                let whole = touch == shared::Touch::Write
                    && ctx.shared_together(addresses, total, mask, touch, self.index);
                for lane in lanes(mask) {
                    if touch == shared::Touch::Atomic {
                        ctx.shared_define(addresses[lane] & WINDOW_MASK, total);
                    }
                    let at = match whole {
                        true => (addresses[lane] & WINDOW_MASK) as usize,
                        false => ctx.shared_range(
                            addresses[lane],
                            total,
                            total,
                            touch,
                            self.index,
                            lane,
                        )?,
                    };
                    for (n, value) in values.iter().enumerate().take(count) {
                        ctx.shared_write(at + n * size as usize, size as usize, value[lane]);
                    }
                }
                check_collisions(addresses, total, mask, &values[..count])?;
            }
            Space::Cluster => {
                let touch = if access.strong {
                    shared::Touch::Atomic
                } else {
                    shared::Touch::Write
                };
                for lane in lanes(mask) {
                    let place = ctx.place(addresses[lane], lane)?;
                    if touch == shared::Touch::Atomic {
                        ctx.define_place(place, total);
                    }
                    let at = ctx.visit(place, total, total, touch, self.index, lane)?;
                    let memory = ctx.memory_of(place.rank);
                    for (n, value) in values.iter().enumerate().take(count) {
                        memory.write(at + n * size as usize, size as usize, value[lane]);
                    }
                }
                ctx.counters.remote_access(total, mask);
                check_collisions(addresses, total, mask, &values[..count])?;
            }
            Space::Local => {
                for lane in lanes(mask) {
                    for (n, value) in values.iter().enumerate().take(count) {
                        let at = (addresses[lane] & WINDOW_MASK) + n as u64 * size;
                        self.local_write(at, size, lane, value[lane])?;
                    }
                }
            }
            Space::Param => {
                return Err(Fault::new(
                    Kind::IllegalInstruction,
                    None,
                    "store to kernel parameters",
                ));
            }
            _ => {
                ctx.counters.global_access(false, addresses, total, mask);
                let touch = if access.strong {
                    Touch::AtomicWrite
                } else {
                    Touch::Write
                };
                if touch == Touch::Write
                    && let Some(allocation) = ctx.common_allocation(addresses, total, mask)
                {
                    let whole = ctx.touch_row(allocation, addresses, total, touch, mask);
                    for lane in lanes(mask) {
                        let at = match whole {
                            true => addresses[lane] - allocation.base,
                            false => ctx.touch(allocation, addresses[lane], total, touch, lane)?,
                        };
                        for (n, value) in values.iter().enumerate().take(count) {
                            allocation.write(at + n as u64 * size, size, value[lane]);
                        }
                    }
                    return Ok(());
                }
                if access.strong {
                    ctx.publish();
                }
                for lane in lanes(mask) {
                    let (allocation, at) =
                        ctx.global(addresses[lane], total, total, touch, lane)?;
                    for (n, value) in values.iter().enumerate().take(count) {
                        allocation.write(at + n as u64 * size, size, value[lane]);
                    }
                }
            }
        }
        Ok(())
    }

    fn local_index(&self, at: u64, size: u64, lane: usize) -> Checked<usize> {
        if !at.is_multiple_of(size) {
            return Err(misaligned("local", "access", at, size, lane));
        }
        if at + size > self.local.len() as u64 * 4 {
            let message = format!(
                "local access of {size} bytes at offset {at} of {}",
                self.local.len() * 4
            );
            return Err(Fault::new(Kind::OutOfBounds, lane as u32, message));
        }
        Ok((at / 4) as usize)
    }

    fn local_read(&self, at: u64, size: u64, lane: usize) -> Checked<u64> {
        let word = self.local_index(at, size, lane)?;
        let low = u64::from(self.local[word][lane]);
        Ok(match size {
            8 => low | u64::from(self.local[word + 1][lane]) << 32,
            4 => low,
            _ => low >> (8 * (at % 4)) & ((1 << (8 * size)) - 1),
        })
    }

    fn local_write(&mut self, at: u64, size: u64, lane: usize, value: u64) -> Checked<()> {
        let word = self.local_index(at, size, lane)?;
        if size >= 4 {
            self.local[word][lane] = value as u32;
            if size == 8 {
                self.local[word + 1][lane] = (value >> 32) as u32;
            }
            return Ok(());
        }
        let (shift, mask) = (8 * (at % 4), (1u32 << (8 * size)) - 1);
        let slot = &mut self.local[word][lane];
        *slot = *slot & !(mask << shift) | (value as u32 & mask) << shift;
        Ok(())
    }

    /// Reads for messages: any space, unchecked for races; None outside memory.
    pub fn peek(&self, ctx: &Context<'_>, address: u64, size: u64, lane: usize) -> Option<u64> {
        match window_space(address) {
            Space::Local => self.local_read(address & WINDOW_MASK, size, lane).ok(),
            Space::Shared => {
                let at = (address & WINDOW_MASK) as usize;
                (at + size as usize <= ctx.memory.bytes.len())
                    .then(|| ctx.shared_read(at, size as usize))
            }
            Space::Param => ctx.launch.param(address & WINDOW_MASK, size, lane).ok(),
            _ => {
                let allocation = ctx.launch.view.get(ctx.launch.view.find(address)?)?;
                let offset = address - allocation.base;
                (address.is_multiple_of(size) && offset + size <= allocation.size)
                    .then(|| allocation.read(offset, size))
            }
        }
    }
}

/// Two lanes of one store instruction writing different values to one place: which of them
/// lasts is undefined.
fn check_collisions(
    addresses: &[u64; LANES],
    total: u64,
    mask: u32,
    values: &[[u64; LANES]],
) -> Checked<()> {
    let mut previous: Option<usize> = None;
    let ascending = lanes(mask).all(|lane| {
        let fine = previous.is_none_or(|p| addresses[p] + total <= addresses[lane]);
        previous = Some(lane);
        fine
    });
    if ascending {
        return Ok(());
    }
    let mut order: Vec<usize> = lanes(mask).collect();
    order.sort_by_key(|&lane| addresses[lane]);
    for pair in order.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let differ = values.iter().any(|v| v[a] != v[b]);
        if addresses[a] == addresses[b] && differ {
            let offset = addresses[a] & WINDOW_MASK;
            let message = format!(
                "lanes {a} and {b} store different values to shared offset {offset} at once"
            );
            return Err(Fault::new(Kind::SharedRace, b as u32, message));
        }
    }
    Ok(())
}
