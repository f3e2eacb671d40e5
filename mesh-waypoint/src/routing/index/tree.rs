//! Matches by their paths: a radix tree, in one block of memory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::compiled::Entry;
use super::bucket::Bucket;

/// What a text must be to a path, for its bucket to be visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Exact,
    Prefix,
    /// A prefix that ends where a segment does.
    Segments,
}

/// Buckets by the texts of their paths.
#[derive(Debug)]
pub(super) struct PathTree {
    /// The first is the root; children lie side by side.
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// From its parent's text to its own, without the first byte: that one is among the parent's `heads`.
    label: Box<[u8]>,
    /// First bytes of the children, ascending.
    heads: Box<[u8]>,
    /// Position of the first child.
    children: u32,
    here: Option<Box<Here>>,
}

/// Buckets of one text.
#[derive(Debug, Default)]
struct Here {
    exact: Bucket,
    prefix: Bucket,
    segments: Bucket,
}

impl PathTree {
    /// From texts and the positions of matches that are filed under them.
    pub(super) fn build(mut items: Vec<(&str, Place, u32)>, entries: &[Arc<Entry>]) -> Self {
        items.sort_unstable();
        let text = |at: usize| items[at].0.as_bytes();
        let mut nodes = vec![Node::default()];
        // Items that begin with the text of a node, the length of that text, the node.
        let mut work = VecDeque::from([(0..items.len(), 0, 0)]);
        while let Some((range, depth, node)) = work.pop_front() {
            let longer = range.start + items[range.clone()].partition_point(|item| item.0.len() == depth);
            if longer > range.start {
                nodes[node].here = Some(Box::new(Here::build(&items[range.start..longer], entries)));
            }
            nodes[node].children = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
            let mut heads = Vec::new();
            let mut at = longer;
            while at < range.end {
                let head = text(at)[depth];
                let end = at + items[at..range.end].partition_point(|item| item.0.as_bytes()[depth] == head);
                // Sorted: what the first and the last have in common, all have.
                let common = common(&text(at)[depth..], &text(end - 1)[depth..]);
                heads.push(head);
                work.push_back((at..end, depth + common, nodes.len()));
                nodes.push(Node { label: text(at)[depth + 1..depth + common].into(), ..Node::default() });
                at = end;
            }
            nodes[node].heads = heads.into();
        }
        nodes.shrink_to_fit();
        Self { nodes }
    }

    /// Visits the buckets that a path falls into.
    pub(super) fn walk(&self, path: &str, visit: &mut dyn FnMut(&Bucket)) {
        let path = path.as_bytes();
        let mut depth = 0;
        let mut node = &self.nodes[0];
        loop {
            if let Some(here) = &node.here {
                visit(&here.prefix);
                if depth == path.len() {
                    visit(&here.exact);
                }
                if depth == 0 || matches!(path.get(depth), None | Some(b'/')) {
                    visit(&here.segments);
                }
            }
            let Some(next) = path.get(depth).and_then(|head| self.child(node, *head)) else { return };
            depth += 1;
            // Most are empty in a large tree, and comparing nothing at an address that is none is slow: glibc's `memcmp`
            // reads it under a mask, and the processor takes 30 ns to find out that there was no need.
            if !next.label.is_empty() && !path[depth..].starts_with(&next.label) {
                return;
            }
            depth += next.label.len();
            node = next;
        }
    }
}

impl PathTree {
    fn child(&self, node: &Node, head: u8) -> Option<&Node> {
        // Digits and letters mostly come without gaps.
        let guess = usize::from(head.wrapping_sub(*node.heads.first()?));
        let at = match node.heads.get(guess) {
            Some(found) if *found == head => guess,
            _ => node.heads.iter().position(|other| *other == head)?,
        };
        self.nodes.get(node.children as usize + at)
    }
}

impl Here {
    /// From the items of one text, which are sorted by place and position.
    fn build(mut items: &[(&str, Place, u32)], entries: &[Arc<Entry>]) -> Self {
        let mut next = |place| {
            let (these, others) = items.split_at(items.partition_point(|item| item.1 <= place));
            items = others;
            Bucket::build(these.iter().map(|item| item.2).collect(), entries)
        };
        Self { exact: next(Place::Exact), prefix: next(Place::Prefix), segments: next(Place::Segments) }
    }
}

fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}
