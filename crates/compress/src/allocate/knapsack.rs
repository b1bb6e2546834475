//! The multiple-choice knapsack: one option for each item, the least cost within a capacity.
//!
//! 1. Options that another one beats in both size and cost are out.
//! 2. `best[s]` is the least cost of the items so far in at most `s` units beyond everyone's
//!    smallest option; item by item, `best'[s] = min over options of best[s − size] + cost`.
//! 3. The choices are read back from the last item to the first.
//!
//! A unit is the greatest common divisor of all sizes, and the result exact, as long as the table
//! stays small; beyond that sizes are rounded up to larger units, and what rounding left over is
//! spent on the exchanges that gain most a byte.

/// What can be chosen for an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) size: u64,
    pub(super) cost: f64,
}

/// Entries of the table.
const TABLE: u64 = 1 << 25;

/// The option of each item, or `None` where not even the smallest ones fit.
///
/// # Panics
/// Where an item has no option, or more than 255.
pub(super) fn choose(items: &[Vec<Choice>], capacity: u64) -> Option<Vec<usize>> {
    choose_within(items, capacity, TABLE)
}

fn choose_within(items: &[Vec<Choice>], capacity: u64, table: u64) -> Option<Vec<usize>> {
    // (1)
    let fronts: Vec<Vec<usize>> = items.iter().map(|options| front(options)).collect();
    let smallest = |i: usize| items[i][fronts[i][0]].size;
    let least: u64 = (0..items.len()).map(smallest).sum();
    let room = capacity.checked_sub(least)?;
    let extra = |i: usize, option: usize| items[i][option].size - smallest(i);
    let all = || fronts.iter().enumerate().flat_map(|(i, f)| f.iter().map(move |&o| (i, o)));
    let most: u64 = fronts.iter().enumerate().map(|(i, f)| extra(i, f[f.len() - 1])).sum();
    let room = room.min(most);
    let exact = all().fold(0, |divisor, (i, o)| gcd(divisor, extra(i, o))).max(1);
    let unit = exact.max(room.div_ceil((table / items.len().max(1) as u64).max(1)));
    // (2)
    let steps = (room / unit) as usize + 1;
    let mut best = vec![0.0; steps];
    let mut chosen = vec![0u8; steps * items.len()];
    for (i, chosen) in chosen.chunks_exact_mut(steps).enumerate() {
        let mut next = vec![f64::INFINITY; steps];
        for (number, &option) in fronts[i].iter().enumerate() {
            let number = u8::try_from(number).expect("at most 255 options");
            let units = extra(i, option).div_ceil(unit) as usize;
            for s in units..steps {
                let cost = best[s - units] + items[i][option].cost;
                if cost < next[s] {
                    (next[s], chosen[s]) = (cost, number);
                }
            }
        }
        best = next;
    }
    // (3)
    let mut at = steps - 1;
    let mut picks = vec![0; items.len()];
    for i in (0..items.len()).rev() {
        picks[i] = fronts[i][usize::from(chosen[i * steps + at])];
        at -= extra(i, picks[i]).div_ceil(unit) as usize;
    }
    let spent: u64 = picks.iter().enumerate().map(|(i, &pick)| extra(i, pick)).sum();
    spend(items, &mut picks, room - spent);
    Some(picks)
}

/// Exchanges options for better ones, the most gain a byte first, while there is room.
fn spend(items: &[Vec<Choice>], picks: &mut [usize], mut room: u64) {
    loop {
        let exchanges = items.iter().enumerate().flat_map(|(i, options)| {
            let now = options[picks[i]];
            let gain = move |o: &Choice| (now.cost - o.cost) / o.size.abs_diff(now.size) as f64;
            let fits = move |o: &Choice| {
                o.cost < now.cost && o.size > now.size && o.size - now.size <= room
            };
            let better = options.iter().enumerate().filter(move |(_, o)| fits(o));
            better.map(move |(option, o)| (gain(o), i, option))
        });
        let Some((_, i, option)) = exchanges.max_by(|a, b| a.0.total_cmp(&b.0)) else { return };
        room -= items[i][option].size - items[i][picks[i]].size;
        picks[i] = option;
    }
}

/// The options that no other one beats, by size.
fn front(options: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (options[a], options[b]);
        a.size.cmp(&b.size).then(a.cost.total_cmp(&b.cost))
    });
    let mut least = f64::INFINITY;
    order.retain(|&o| {
        options[o].cost < least && {
            least = options[o].cost;
            true
        }
    });
    order
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator of numbers below `n`.
    fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut state = seed;
        move |n| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        }
    }

    fn random_items(seed: u64, count: usize, unit: u64) -> Vec<Vec<Choice>> {
        let mut number = numbers(seed);
        let mut choice =
            || Choice { size: unit * (1 + number(40)), cost: number(1000) as f64 / 16.0 };
        (0..count).map(|i| (0..2 + i % 4).map(|_| choice()).collect()).collect()
    }

    fn total(items: &[Vec<Choice>], picks: &[usize]) -> (u64, f64) {
        let picked = || items.iter().zip(picks).map(|(options, &pick)| options[pick]);
        (picked().map(|c| c.size).sum(), picked().map(|c| c.cost).sum())
    }

    /// The least cost of all combinations that fit.
    fn exhaustive(items: &[Vec<Choice>], capacity: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let costs = first.iter().filter(|c| c.size <= capacity);
        let costs = costs.filter_map(|c| Some(c.cost + exhaustive(rest, capacity - c.size)?));
        costs.min_by(f64::total_cmp)
    }

    #[test]
    fn the_choice_is_the_best_of_all_combinations() {
        for seed in 0..60 {
            let items = random_items(seed, 6, 7);
            for capacity in [60, 300, 500, 700, 900, 5000] {
                let picks = choose(&items, capacity);
                let expected = exhaustive(&items, capacity);
                assert_eq!(picks.as_ref().map(|p| total(&items, p).1), expected, "seed {seed}");
                assert!(picks.is_none_or(|p| total(&items, &p).0 <= capacity));
            }
        }
    }

    #[test]
    fn a_coarse_table_stays_within_the_capacity_and_near_the_best() {
        for seed in 0..20 {
            let items = random_items(seed, 60, 1);
            let least: u64 = items.iter().flat_map(|o| o.iter().map(|c| c.size).min()).sum();
            for capacity in [least + 40, least + 200, least + 400] {
                let exact = total(&items, &choose(&items, capacity).unwrap());
                // 60 items in 100 units each.
                let coarse = total(&items, &choose_within(&items, capacity, 6000).unwrap());
                assert!(coarse.0 <= capacity);
                assert!(coarse.1 >= exact.1 && coarse.1 <= exact.1 * 1.35, "{coarse:?} {exact:?}");
            }
        }
    }

    #[test]
    fn nothing_fits_and_everything_fits() {
        let choice = |size, cost| Choice { size, cost };
        let items = vec![vec![choice(10, 1.0), choice(20, 0.5)], vec![choice(30, 2.0)]];
        assert_eq!(choose(&items, 39), None);
        assert_eq!(choose(&items, 40), Some(vec![0, 0]));
        assert_eq!(choose(&items, u64::MAX), Some(vec![1, 0]));
        assert_eq!(choose(&[], 0), Some(vec![]));
    }
}
