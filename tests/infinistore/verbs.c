/* A stand-in for libibverbs.so.1: one InfiniBand device that is up and can do nothing.
 *
 * The InfiniStore server starts only where it finds an RDMA device, also when all its clients use TCP. Preloaded under the
 * real library's soname this satisfies it: the device opens, its port is active, memory "registers" without being pinned.
 * Whatever would move data fails with EOPNOTSUPP, so that no test takes it for RDMA.
 *
 * gcc -shared -fPIC -Wl,-soname,libibverbs.so.1 -Wl,--version-script=verbs.map -o verbs.so verbs.c
 */
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>

/* The header's inline functions of these names call the exported ones below. */
#undef ibv_query_port
#undef ibv_reg_mr

static struct ibv_device device = {
    .node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "mlx5_1", .dev_name = "uverbs1"};

struct ibv_device **ibv_get_device_list(int *count) {
    struct ibv_device **list = calloc(2, sizeof *list);
    if (list) list[0] = &device;
    if (count) *count = list ? 1 : 0;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) { free(list); }

const char *ibv_get_device_name(struct ibv_device *of) { return of->name; }

/* A context without extended operations (abi_compat unset): the header's inline functions then come here. */
struct ibv_context *ibv_open_device(struct ibv_device *of) {
    struct ibv_context *context = calloc(1, sizeof *context);
    if (!context) return NULL;
    context->device = of;
    context->cmd_fd = context->async_fd = -1;
    context->num_comp_vectors = 1;
    return context;
}

int ibv_close_device(struct ibv_context *context) {
    free(context);
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *answer) {
    (void)context;
    memset(answer, 0, sizeof *answer);
    answer->max_mr_size = UINT64_MAX;
    answer->max_qp = answer->max_cq = answer->max_mr = answer->max_pd = 1024;
    answer->max_qp_wr = answer->max_cqe = 16384;
    answer->max_sge = 16;
    answer->phys_port_cnt = 1;
    return 0;
}

/* The caller's structure may be older and shorter than this header's: nothing after `flags` is written. */
int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *into) {
    struct ibv_port_attr *answer = (struct ibv_port_attr *)into;
    (void)context;
    if (port != 1) return EINVAL;
    answer->state = IBV_PORT_ACTIVE;
    answer->max_mtu = answer->active_mtu = IBV_MTU_4096;
    answer->gid_tbl_len = 1;
    answer->max_msg_sz = 1u << 30;
    answer->pkey_tbl_len = 1;
    answer->lid = 1;
    answer->active_width = 2;
    answer->active_speed = 32;
    answer->phys_state = 5; /* link up */
    answer->link_layer = IBV_LINK_LAYER_INFINIBAND;
    return 0;
}

int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid) {
    (void)context;
    if (port != 1 || index != 0) return EINVAL;
    memset(gid, 0, sizeof *gid);
    gid->raw[0] = 0xfe;
    gid->raw[1] = 0x80;
    gid->raw[15] = 1;
    return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context) {
    struct ibv_pd *domain = calloc(1, sizeof *domain);
    if (domain) domain->context = context;
    return domain;
}

int ibv_dealloc_pd(struct ibv_pd *domain) {
    free(domain);
    return 0;
}

/* Nothing is pinned or touched: a pool costs what is stored in it. */
struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *domain, void *start, size_t length, uint64_t iova, unsigned int access) {
    struct ibv_mr *region = calloc(1, sizeof *region);
    (void)iova, (void)access;
    if (!region) return NULL;
    region->context = domain->context;
    region->pd = domain;
    region->addr = start;
    region->length = length;
    region->lkey = region->rkey = 1;
    return region;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *domain, void *start, size_t length, int access) {
    return ibv_reg_mr_iova2(domain, start, length, (uintptr_t)start, (unsigned int)access);
}

int ibv_dereg_mr(struct ibv_mr *region) {
    free(region);
    return 0;
}

/* From here on: what would move data. */
static void *unsupported(void) {
    errno = EOPNOTSUPP;
    return NULL;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context) { return (void)context, unsupported(); }
int ibv_destroy_comp_channel(struct ibv_comp_channel *channel) { return (void)channel, EOPNOTSUPP; }

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int length, void *owner, struct ibv_comp_channel *channel, int vector) {
    (void)context, (void)length, (void)owner, (void)channel, (void)vector;
    return unsupported();
}

int ibv_destroy_cq(struct ibv_cq *queue) { return (void)queue, EOPNOTSUPP; }
int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **queue, void **owner) {
    (void)channel, (void)queue, (void)owner;
    errno = EOPNOTSUPP;
    return -1;
}
void ibv_ack_cq_events(struct ibv_cq *queue, unsigned int count) { (void)queue, (void)count; }

struct ibv_qp *ibv_create_qp(struct ibv_pd *domain, struct ibv_qp_init_attr *wanted) { return (void)domain, (void)wanted, unsupported(); }
int ibv_modify_qp(struct ibv_qp *pair, struct ibv_qp_attr *wanted, int mask) { return (void)pair, (void)wanted, (void)mask, EOPNOTSUPP; }
int ibv_destroy_qp(struct ibv_qp *pair) { return (void)pair, EOPNOTSUPP; }

const char *ibv_wc_status_str(enum ibv_wc_status status) { return (void)status, "no RDMA here"; }
