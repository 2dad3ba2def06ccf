#include "steermoe-sequences.h"

#include "ggml.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "steermoe-rows.h"

#include <algorithm>

namespace {

bool is_empty(const steermoe_bias & bias) {
    for (int32_t il = 0; il < bias.n_layer; il++) {
        if (!bias.layer_is_zero(il)) {
            return false;
        }
    }
    return true;
}

// Do they steer alike?
bool same_values(const steermoe_bias & a, const steermoe_bias & b) {
    if (a.mode != b.mode || (a.mode == STEERMOE_MODE_HARD && a.epsilon != b.epsilon) || a.n_layer != b.n_layer) {
        return false;
    }
    for (int32_t il = 0; il < a.n_layer; il++) {
        const bool zero = a.layer_is_zero(il);
        if (zero != b.layer_is_zero(il) || (!zero && a.layers[il] != b.layers[il])) {
            return false;
        }
    }
    return true;
}

// Rows of a bank that is to have at least n.
int32_t capacity(int32_t n) {
    int32_t rows = 4;
    while (rows < n) {
        rows *= 2;
    }
    return rows;
}

} // namespace

steermoe_sequences::steermoe_sequences(const llama_model & model) : model(model), seqs(LLAMA_MAX_SEQ) {}

steermoe_sequences::~steermoe_sequences() = default;

//
// who is under what
//

bool steermoe_sequences::attach(const steermoe_bias & bias, const layers_t & layers) {
    return set(own, true, &bias, layers);
}

bool steermoe_sequences::attach_seq(int32_t seq, const steermoe_bias * bias, const layers_t & layers) {
    return set(seqs.at(seq), true, bias, layers);
}

bool steermoe_sequences::detach_seq(int32_t seq) {
    return set(seqs.at(seq), false, nullptr, {});
}

bool steermoe_sequences::detach() {
    const bool any = bank != nullptr || own.under != nullptr;
    std::fill(seqs.begin(), seqs.end(), slot());
    own = slot();
    bank.reset();
    refresh();
    return any;
}

bool steermoe_sequences::set(slot & s, bool given, const steermoe_bias * bias, const layers_t & layers) {
    if (bias != nullptr && is_empty(*bias)) {
        bias = nullptr;
    }
    const uint64_t         old_topology = own.under ? own.under->topology : 0;
    const bool             goes         = s.under != nullptr && s.under.use_count() == 1; // what s is under now
    std::shared_ptr<entry> next         = bias != nullptr ? find(*bias) : nullptr;
    const bool             found        = next != nullptr;
    if (bias != nullptr && !found) {
        // new values in the same tensors keep the graphs
        const bool refill = goes && s.under->plain.same_topology(*bias);
        next              = refill ? s.under : std::make_shared<entry>(*bias, model, layers, ++n_topologies);
    }

    std::vector<entry *> after = entries(goes ? &s : nullptr);
    if (next != nullptr && std::find(after.begin(), after.end(), next.get()) == after.end()) {
        after.push_back(next.get());
    }
    const bool several =
        std::any_of(seqs.begin(), seqs.end(), [&](const slot & q) { return &q == &s ? given : q.given; });
    const auto                     n_rows = (int32_t) after.size() + 1;
    std::unique_ptr<steermoe_bank> grown;
    if (bank != nullptr ? n_rows > bank->n_rows : several && !after.empty()) {
        grown = std::make_unique<steermoe_bank>(model, layers, (int32_t) model.hparams.n_expert, capacity(n_rows));
    }

    // from here on nothing fails
    const bool created = bank == nullptr && grown != nullptr;
    if (next != nullptr && next == s.under && !found) {
        next->bias = *bias;
        next->plain.update(*bias);
    }
    s = { given, next };
    if (grown != nullptr) {
        bank = std::move(grown);
        for (size_t i = 0; i < after.size(); i++) {
            after[i]->row = (int32_t) i + 1;
            bank->write(after[i]->row, after[i]->bias);
        }
        bank_topology = 0;
    } else if (bank != nullptr && next != nullptr && !found) {
        if (next->row == steermoe_bank::UNSTEERED) {
            next->row = free_row(after);
        }
        bank->write(next->row, next->bias);
    }
    refresh();
    if (bank != nullptr) {
        return created; // its graphs hold all others
    }
    return old_topology != (own.under ? own.under->topology : 0);
}

// The first row of the bank that no entry has.
int32_t steermoe_sequences::free_row(const std::vector<entry *> & all) const {
    std::vector<bool> taken((size_t) bank->n_rows);
    taken[steermoe_bank::UNSTEERED] = true;
    for (const entry * e : all) {
        taken[e->row] = true;
    }
    return (int32_t) (std::find(taken.begin(), taken.end(), false) - taken.begin());
}

std::shared_ptr<steermoe_sequences::entry> steermoe_sequences::find(const steermoe_bias & bias) const {
    if (own.under != nullptr && same_values(own.under->bias, bias)) {
        return own.under;
    }
    for (const slot & s : seqs) {
        if (s.under != nullptr && same_values(s.under->bias, bias)) {
            return s.under;
        }
    }
    return nullptr;
}

std::vector<steermoe_sequences::entry *> steermoe_sequences::entries(const slot * without) const {
    std::vector<entry *> all;
    const auto           add = [&](const slot & s) {
        if (&s != without && s.under != nullptr && std::find(all.begin(), all.end(), s.under.get()) == all.end()) {
            all.push_back(s.under.get());
        }
    };
    add(own);
    std::for_each(seqs.begin(), seqs.end(), add);
    return all;
}

// Note which rules the rows follow; other rules give other graphs.
void steermoe_sequences::refresh() {
    std::vector<steermoe_bank::rules> now(model.hparams.n_layer());
    for (const entry * e : entries()) {
        for (int il = 0; il < (int) now.size(); il++) {
            const bool steers = e->plain.has(il);
            now[il].hard      = now[il].hard || (steers && e->bias.mode == STEERMOE_MODE_HARD);
            now[il].soft      = now[il].soft || (steers && e->bias.mode == STEERMOE_MODE_SOFT);
        }
    }
    const auto same = [](const steermoe_bank::rules & a, const steermoe_bank::rules & b) {
        return a.hard == b.hard && a.soft == b.soft;
    };
    if (bank_topology == 0 || !std::equal(now.begin(), now.end(), rules.begin(), rules.end(), same)) {
        bank_topology = ++n_topologies;
        rules         = std::move(now);
    }
}

bool steermoe_sequences::steers(int il) const {
    return il >= 0 && (size_t) il < rules.size() && rules[il].any();
}

const steermoe_sequences::entry * steermoe_sequences::entry_of(int32_t seq) const {
    const slot & s = seqs[seq];
    return s.given ? s.under.get() : own.under.get();
}

// All sequences of a token are under one steering, see obstacle().
const steermoe_sequences::entry * steermoe_sequences::entry_of(const llama_ubatch & ubatch, uint32_t i) const {
    return entry_of(ubatch.seq_id[i][0]);
}

int32_t steermoe_sequences::row_of(const llama_ubatch & ubatch, uint32_t i) const {
    const entry * e = entry_of(ubatch, i);
    return e != nullptr ? e->row : steermoe_bank::UNSTEERED;
}

float steermoe_sequences::epsilon_of(const llama_ubatch & ubatch, uint32_t i) const {
    const entry * e = entry_of(ubatch, i);
    return e != nullptr ? e->bias.epsilon : 0.0f;
}

std::string steermoe_sequences::obstacle(const llama_batch & batch) const {
    for (int32_t i = 0; bank != nullptr && i < batch.n_tokens; i++) {
        for (int32_t s = 1; s < batch.n_seq_id[i]; s++) {
            const auto [a, b] = std::minmax(batch.seq_id[i][0], batch.seq_id[i][s]);
            if (entry_of(a) != entry_of(b)) {
                return "steering: token " + std::to_string(i) + " of the batch belongs to the sequences " +
                       std::to_string(a) + " and " + std::to_string(b) +
                       ", which are steered differently; give each a token of its own";
            }
        }
    }
    return "";
}

//
// a graph
//

uint64_t steermoe_sequences::begin_graph(const llama_ubatch * ubatch) {
    rows  = nullptr;
    mixed = full = bank != nullptr && ubatch == nullptr;
    plain        = mixed ? nullptr : own.under.get();
    if (bank != nullptr && ubatch != nullptr) {
        plain = ubatch->n_tokens > 0 ? entry_of(*ubatch, 0) : nullptr;
        for (uint32_t i = 1; i < ubatch->n_tokens && !mixed; i++) {
            mixed = entry_of(*ubatch, i) != plain;
        }
    }
    return mixed ? bank_topology : plain != nullptr ? plain->topology : 0;
}

steermoe_columns steermoe_sequences::columns(ggml_context * ctx, llm_graph_result * res, int64_t n) {
    if (rows == nullptr) {
        rows = static_cast<steermoe_rows *>(res->add_input(std::make_unique<steermoe_rows>(*this)));
    }
    return rows->columns(ctx, n);
}

ggml_tensor * steermoe_sequences::edit_logits(ggml_context * ctx, llm_graph_result * res, ggml_tensor * logits,
                                              int il) {
    if (!mixed) {
        return plain != nullptr ? plain->plain.edit_logits(ctx, logits, il) : logits;
    }
    const steermoe_bank::rules r = full ? steermoe_bank::rules{ true, true } : rules[il];
    return r.any() ? bank->edit_logits(ctx, logits, il, r, columns(ctx, res, logits->ne[1])) : logits;
}

ggml_tensor * steermoe_sequences::edit_selection(ggml_context * ctx, ggml_tensor * scores, int il) {
    if (!mixed) {
        return plain != nullptr ? plain->plain.edit_selection(ctx, scores, il) : scores;
    }
    const steermoe_bank::rules r = full ? steermoe_bank::rules{ true, true } : rules[il];
    return r.hard ? bank->edit_selection(ctx, scores, il, r, rows->columns(ctx, scores->ne[1])) : scores;
}

uint32_t steermoe_sequences::n_nodes() const {
    if (bank != nullptr) {
        return bank->n_nodes();
    }
    return own.under != nullptr ? own.under->plain.n_nodes() : 0;
}
